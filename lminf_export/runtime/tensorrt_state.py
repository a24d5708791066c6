"""The state of a TensorRT session: caches on the GPU, and the small tensors of a step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import SessionError
from lminf_export.operator import bindings
from lminf_export.runtime.cache import State
from lminf_export.runtime.gpu import Buffers, Cuda, Graph
from lminf_export.runtime.snapshot import numpy_dtype

_SMALL = (bindings.INPUT_IDS, bindings.PAST_LENGTH, bindings.NEW_LENGTH, bindings.LOGITS_INDEX)
# TensorRT asks this of every tensor's address.
_ALIGNMENT = 256
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


class TensorRTState(State):
    """Caches in the GPU's memory, full-sized from the start; freed with this object.

    Args:
        cuda: the session's stream and memory.
        manifest: of the bundle; its engine says how caches are bound.
        batch_size: B.
    """

    def __init__(self, cuda: Cuda, manifest: Manifest, batch_size: int) -> None:
        contract = manifest.contract
        super().__init__(contract, batch_size, {size: size for size in contract.ring_capacities})
        assert manifest.engine is not None
        self.cuda = cuda
        self._double_sinks = not manifest.engine.sinks_in_place
        self._require_memory()
        self._buffers = Buffers(cuda)
        weakref.finalize(self, self._buffers.free)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._past: dict[str, int] = {}
        self._present: dict[str, int] = {}
        for past, present in zip(
            contract.caches(present=False),
            contract.caches(present=True),
            strict=True,
        ):
            self._add_cache(past, present.name)
        chunk = manifest.lambda_config.chunk_size
        # Single tokens have a block of their own, whose addresses a record may rely on.
        self._blocks = {
            single: SmallInputs(cuda, self._buffers, f"inputs {name}", batch_size, width, width)
            for single, name, width in ((True, "single", 1), (False, "chunk", chunk))
        }
        self._logits: dict[bool, np.ndarray] = {}
        self.decoder: Decoder | None = None

    def load(self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray) -> bool:
        """Write a step's small inputs; returns whether the step is one of single tokens."""
        single = input_ids.shape[1] == 1 and logits_index.shape[1] == 1
        self._blocks[single].write(input_ids, self._past_length, new_length, logits_index)
        shape = (*logits_index.shape, self.contract.vocab_size)
        logits = self._logits.get(single)
        if logits is None or logits.shape != shape:
            nbytes = prod(shape) * np.dtype(np.float32).itemsize
            self._buffers.reserve(_logits(single), nbytes)
            host = self._buffers.reserve_host(_logits(single), nbytes)
            self._logits[single] = host[:nbytes].view(np.float32).reshape(shape)
        return single

    def send(self, single: bool) -> None:
        """Enqueue the copy of the small inputs to the GPU."""
        self._blocks[single].send()

    def receive(self, single: bool) -> None:
        """Enqueue the copy of the logits from the GPU."""
        self.cuda.receive(self._logits[single], self._buffers[_logits(single)])

    def inputs(self, single: bool) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return the address and shape of every input of the step loaded last."""
        caches = {name: (address, self._shapes[name]) for name, address in self._past.items()}
        return {**self._blocks[single].tensors(), **caches}

    def outputs(self, single: bool) -> dict[str, int]:
        """Return the address of every output."""
        return {bindings.LOGITS: self._buffers[_logits(single)], **self._present}

    def finish(self, single: bool) -> np.ndarray:
        """Wait for the step; return the logits (B, K, V), valid until the next one."""
        self.cuda.synchronize()
        if self._double_sinks:
            for past, present in zip(self._past, self._present, strict=True):
                self._past[past], self._present[present] = (
                    self._present[present],
                    self._past[past],
                )
        return self._logits[single]

    def _read_caches(self) -> dict[str, np.ndarray]:
        sizes = {**self.contract.ring_sizes(), bindings.BATCH: self.batch_size}
        caches = {}
        for spec in self.contract.caches(present=False):
            caches[spec.name] = np.empty(spec.sized(sizes), numpy_dtype(spec.dtype))
            self.cuda.receive(caches[spec.name], self._past[spec.name])
        self.cuda.synchronize()
        return caches

    def _write_caches(self, caches: Mapping[str, np.ndarray]) -> None:
        for name, shape in self._shapes.items():
            whole = np.zeros(shape, caches[name].dtype)
            whole[:, :, : caches[name].shape[2]] = caches[name]
            self.cuda.send(self._past[name], whole)
            self.cuda.synchronize()  # before the array is freed

    def keep_graph(self, graph: Graph) -> None:
        """Own a recorded step, which goes before the memory it works on."""
        self._buffers.graphs.append(graph)

    def _add_cache(self, past: bindings.TensorSpec, present: str) -> None:
        sizes = {**self.contract.ring_sizes(), bindings.BATCH: self.batch_size}
        nbytes = past.nbytes(sizes)
        self._shapes[past.name] = past.sized(sizes)
        self._past[past.name] = self._buffers.reserve(past.name, nbytes, zeroed=True)
        self._present[present] = self._past[past.name]
        if self._double_sinks and past.name in self.contract.sink_updates():
            self._present[present] = self._buffers.reserve(present, nbytes, zeroed=True)

    def _require_memory(self) -> None:
        free, total = self.cuda.memory()
        if self.max_nbytes > free:
            raise SessionError(
                f"the caches of {self.batch_size} streams take {human_bytes(self.max_nbytes)}, "
                f"this GPU has {human_bytes(free)} free of {human_bytes(total)}; use a smaller "
                "batch or export with a smaller --window-size"
            )


class Decoder:
    """A state's own context for single tokens, run once directly and then launched from a record.

    A record belongs to its context and its addresses, so every state has one.

    Attributes:
        context: an IExecutionContext that has this state's shapes and addresses.
        graph: the recorded step, None before the second one.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.has_run = False
        self.graph: Graph | None = None


def _logits(single: bool) -> str:
    return f"{bindings.LOGITS} {'single' if single else 'chunk'}"


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _offsets(lengths: tuple[int, ...]) -> list[int]:
    offsets, start = [], 0
    for length in lengths:
        offsets.append(start)
        start += _aligned(length * _INT64_BYTES)
    return offsets
