"""Tensors of GGUF files: quantised in blocks along their rows, decoded by the package `gguf`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.tensors.dtypes import MODEL_DTYPES, safetensors_name
from lminf_export.tensors.lazy import LazyTensor
from lminf_export.tensors.stored import StoredTensor

# Types of single numbers, which GGUF and safetensors call alike.
_PLAIN = tuple(safetensors_name(name) for name in MODEL_DTYPES)
# Elements that are decoded in one call: few calls, and their intermediate results stay in cache.
_AT_ONCE = 2**16


@dataclass(frozen=True, eq=False)
class GgufTensor(LazyTensor):
    """A tensor of a GGUF file, read as float32, with its blocks as they are stored.

    A tensor of shape (…, K) is seen as N rows of K elements, N the product of the other
    dimensions. Every row is a whole number of blocks, so rows can be cut and reordered without
    decoding: `raw_rows(start, stop)` gives the stored bytes of rows start … stop − 1, a uint8
    array (stop − start, `row_bytes`), in the order that `rows` decodes. What the bytes of a block
    mean is said by `ggml_type`; a block has `block_size` elements in `block_bytes` bytes.

    A tensor that is not of this class is not stored in one piece: of joined or stacked tensors
    (`checkpoint.conversion`) the parts are of this class, one whose numbers were changed (the
    norms of Gemma) has no blocks.

    Attributes:
        path: the file.
        ggml_type: name of the type, such as "Q4_K", a member of `gguf.GGMLQuantizationType`.
        dimensions: outermost first, as `shape` gives them.
        offset: first byte in the file.
        order: (N,) int64; row i of this tensor is row order[i] of the file; None for its own
            order. Of a tensor of one dimension the order of its elements.
    """

    path: Path
    ggml_type: str
    dimensions: tuple[int, ...]
    offset: int
    order: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.dimensions

    @property
    def block_size(self) -> int:
        """Elements of a block."""
        return _sizes(self.ggml_type)[0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return _sizes(self.ggml_type)[1]

    @property
    def num_rows(self) -> int:
        """N, the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.block_size * self.block_bytes

    @property
    def length(self) -> int:
        """Bytes of the whole tensor."""
        return self.num_rows * self.row_bytes

    def raw_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return a copy of the stored bytes of rows start … stop − 1: (stop − start, row_bytes)."""
        is_cut = self.order is not None and len(self.shape) == 1
        size = (self.shape[-1], self.block_bytes) if is_cut else (self.num_rows, self.row_bytes)
        stored = np.memmap(self.path, np.uint8, "r", self.offset, size)
        if is_cut:
            return np.array(stored[self.order]).reshape(1, -1)[start:stop]
        chosen = slice(start, stop) if self.order is None else self.order[start:stop]
        return np.array(stored[chosen])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Decode the sub-tensor start … stop − 1 of the first dimension."""
        if len(self.shape) == 1:
            return self._decoded(0, 1).reshape(-1)[start:stop]
        per = math.prod(self.shape[1:-1])
        return self._decoded(start * per, stop * per).reshape(-1, *self.shape[1:])

    def at(self, index: int) -> LazyTensor:
        """Return the sub-tensor at an index of the first dimension."""
        if len(self.shape) == 1:
            return super().at(index)
        per = math.prod(self.shape[1:-1])
        first = index * per
        if self.order is None:
            offset = self.offset + first * self.row_bytes
            return replace(self, dimensions=self.shape[1:], offset=offset)
        own = self.order[first : first + per]
        low = int(own.min())
        if int(own.max()) - low >= per:
            return super().at(index)
        offset = self.offset + low * self.row_bytes
        return replace(self, dimensions=self.shape[1:], offset=offset, order=own - low)

    def reordered(self, order: NDArray[np.int64]) -> GgufTensor:
        """Return this tensor with its rows in another order: row i is row order[i] of this one.

        A tensor of one dimension, one row, is reordered by its elements, which a type of blocks
        of one element can be.

        Raises:
            ModelError: the order has another number of rows, or would cut blocks.
        """
        is_vector = len(self.shape) == 1
        count = self.shape[0] if is_vector else self.num_rows
        if len(order) != count or (is_vector and self.block_size > 1):
            raise ModelError(
                f"a tensor of type {self.ggml_type} and shape {list(self.shape)} has no "
                f"{len(order)} rows that can be reordered"
            )
        own = order if self.order is None else self.order[order]
        return replace(self, order=np.asarray(own, np.int64))

    def reshaped(self, *shape: int) -> GgufTensor:
        """Return this tensor with the same rows, in other leading dimensions."""
        assert shape[-1] == self.shape[-1]
        assert math.prod(shape) == math.prod(self.shape)
        return replace(self, dimensions=shape)

    def as_stored(self) -> StoredTensor | None:
        """Return the tensor as one that can be copied as it is; None for blocks or reordered."""
        if self.ggml_type not in _PLAIN or self.order is not None:
            return None
        return StoredTensor(self.path, self.ggml_type, self.shape, self.offset, self.length)

    def check_readable(self, name: str) -> None:
        """Check that the type of the tensor, called `name` in its file, can be decoded.

        Raises:
            ModelError: it cannot.
        """
        if self.ggml_type not in readable_types():
            raise ModelError(
                f"tensor {name} of {self.path.name} is of type {self.ggml_type}, which is not "
                f"read; get a file of one of {', '.join(readable_types())}"
            )

    def _decoded(self, start: int, stop: int) -> torch.Tensor:
        """Decode rows start … stop − 1 of the N: (n, K) float32."""
        raw = self.raw_rows(start, stop)
        decode, width = _decoder(self.ggml_type), self.shape[-1]
        result = np.empty((len(raw), width), np.float32)
        step = max(1, _AT_ONCE // width)
        for first in range(0, len(raw), step):
            # As one row: the library loops over groups of 16 of them.
            part = raw[first : first + step].reshape(1, -1)
            result[first : first + step] = decode(part).reshape(-1, width)
        return torch.from_numpy(result)


@cache
def block_sizes() -> Mapping[int, tuple[str, int, int]]:
    """Return number of a type in a file → its name, elements and bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


@cache
def readable_types() -> tuple[str, ...]:
    """Return the names of the types that the package `gguf` decodes."""
    return tuple(name for name, _, _ in block_sizes().values() if _can_decode(name))


@cache
def _sizes(name: str) -> tuple[int, int]:
    return next(sizes for kind, *sizes in block_sizes().values() if kind == name)  # type: ignore


def _decoder(name: str) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[name]
    return lambda raw: dequantize(raw, kind)


def _can_decode(name: str) -> bool:
    _, size = _sizes(name)
    try:
        _decoder(name)(np.zeros((1, size), np.uint8))
    except NotImplementedError:
        return False
    return True
