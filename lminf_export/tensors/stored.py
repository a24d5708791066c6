"""Tensors of a checkpoint: where they are, and how they are read block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.tensors.dtypes import BY_SAFETENSORS, ELEMENT_TYPES
from lminf_export.tensors.torch_dtypes import dtype_name, stored_torch_dtype, torch_dtype

BLOCK_BYTES = 4 * 2**20
_RAW_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


class SourceTensor(Protocol):
    """A tensor of a checkpoint, read when it is written."""

    @property
    def dtype(self) -> str:
        """safetensors' name of its element type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        ...

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        ...

    def at(self, index: int) -> SourceTensor:
        """Return the sub-tensor at an index of the first dimension."""
        ...


class RawTensor(SourceTensor, Protocol):
    """A tensor of a file, of which any part can be read."""

    def part(self, *index: slice | int) -> torch.Tensor:
        """Return a part, as it is stored; indices as numpy has them."""
        ...


@runtime_checkable
class InFiles(Protocol):
    """A tensor whose bytes may lie in files in their order, which need not be read to be copied."""

    def stored(self) -> list[StoredTensor] | None:
        """Return the parts of files that hold them, or None if they are made of other bytes."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor inside a safetensors file.

    Attributes:
        path: the file.
        dtype: safetensors' name of its element type.
        shape: dimensions.
        offset: first byte in the file.
        length: bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def blocks(self, buffer: NDArray[np.uint8] | None = None) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors.

        Args:
            buffer: BLOCK_BYTES that every tensor lies in, each in the place of the one before; by
                default each has memory of its own.
        """
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, self.length, BLOCK_BYTES):
                count = min(BLOCK_BYTES, self.length - start)
                piece = np.empty(count, np.uint8) if buffer is None else buffer[:count]
                file.seek(self.offset + start)
                left = piece.data
                while left:
                    if not (read := file.readinto(left)):
                        raise ModelError(f"weights file {self.path.name} was cut while it was read")
                    left = left[read:]
                yield torch.from_numpy(piece).view(stored_torch_dtype(self.dtype))

    def stored(self) -> list[StoredTensor]:
        """Return itself."""
        return [self]

    def at(self, index: int) -> StoredTensor:
        """Return the sub-tensor at an index of the first dimension."""
        length = self.length // self.shape[0]
        offset = self.offset + index * length
        return StoredTensor(self.path, self.dtype, self.shape[1:], offset, length)

    def part(self, *index: slice | int) -> torch.Tensor:
        """Return a copy of a part, as it is stored.

        Raises:
            ModelError: its element type is not in the table of `tensors.dtypes`.
        """
        kind = BY_SAFETENSORS.get(self.dtype)
        if kind is None:
            raise ModelError(f"a tensor of {self.path.name} has element type {self.dtype}")
        raw = np.memmap(self.path, _RAW_TYPES[kind.itemsize], "r", self.offset, self.shape)
        return torch.from_numpy(np.array(raw[index])).view(torch_dtype(kind.name))

    def load(self) -> torch.Tensor:
        """Return a copy of the whole tensor."""
        blocks = list(self.blocks())
        if not blocks:
            return torch.empty(self.shape, dtype=stored_torch_dtype(self.dtype))
        return torch.cat(blocks).reshape(self.shape)


@dataclass(frozen=True)
class PickledTensor:
    """One tensor inside a file of `torch.save`, on pages of that file."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        """safetensors' name of its element type, or torch's where it has none here."""
        name = dtype_name(self.tensor.dtype)
        return ELEMENT_TYPES[name].safetensors if name in ELEMENT_TYPES else name

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return tuple(self.tensor.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        flat = self.tensor.flatten()  # a copy only where the tensor was stored transposed
        return iter(flat.split(max(1, BLOCK_BYTES // flat.element_size())))

    def part(self, *index: slice | int) -> torch.Tensor:
        """Return a part, as it is stored."""
        return self.tensor[index]

    def at(self, index: int) -> PickledTensor:
        """Return the sub-tensor at an index of the first dimension."""
        return PickledTensor(self.tensor[index])
