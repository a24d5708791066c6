"""The small inputs of a TensorRT step, in one block that is sent in one copy."""

from __future__ import annotations

import numpy as np

from lminf_export.operator import bindings
from lminf_export.runtime.gpu import Buffers, Cuda

_SMALL = (bindings.INPUT_IDS, bindings.PAST_LENGTH, bindings.NEW_LENGTH, bindings.LOGITS_INDEX)
# TensorRT asks this of every tensor's address.
ALIGNMENT = 256
_INT64_BYTES = 8


class SmallInputs:
    """The inputs that change at every step, in one block that is sent in one copy.

    The arrays lie in page-locked memory, so that a recorded copy reads what stands there when
    the record is played.

    Args:
        cuda: whose memory it is.
        buffers: what owns the memory.
        name: of the block.
        batch_size: B.
        width: largest S.
        count: largest K.
    """

    def __init__(
        self, cuda: Cuda, buffers: Buffers, name: str, batch_size: int, width: int, count: int
    ) -> None:
        self._cuda = cuda
        self._rows = batch_size
        lengths = (batch_size * width, batch_size, batch_size, batch_size * count)
        self._offsets = dict(zip(_SMALL, _offsets(lengths), strict=True))
        self._bytes = sum(_aligned(n * _INT64_BYTES) for n in lengths)
        self._host = buffers.reserve_host(name, self._bytes)
        self._device = buffers.reserve(name, self._bytes)
        self.arrays: dict[str, np.ndarray] = {}

    def write(
        self,
        input_ids: np.ndarray,
        past_length: np.ndarray,
        new_length: np.ndarray,
        logits_index: np.ndarray,
    ) -> None:
        """Write the step's values to the block that the next copy sends."""
        for name, value in zip(
            _SMALL, (input_ids, past_length, new_length, logits_index), strict=True
        ):
            array = self.arrays.get(name)
            if array is None or array.shape != value.shape:
                start = self._offsets[name]
                flat = self._host[start : start + value.size * _INT64_BYTES].view(np.int64)
                array = self.arrays[name] = flat.reshape(value.shape)
            array[...] = value

    def send(self) -> None:
        """Copy the block to the GPU."""
        self._cuda.send(self._device, self._host)

    def tensors(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return the address on the GPU and the shape of each."""
        return {
            name: (self._device + self._offsets[name], array.shape)
            for name, array in self.arrays.items()
        }


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _offsets(lengths: tuple[int, ...]) -> list[int]:
    offsets, start = [], 0
    for length in lengths:
        offsets.append(start)
        start += _aligned(length * _INT64_BYTES)
    return offsets
