"""Rows of a tensor that is too large to be in memory whole: block by block, or a few of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lminf_export.tensors.stored import InFiles, SourceTensor, StoredTensor

# Elements of a block of rows: 32 MiB in float64.
BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a tensor.

    Attributes:
        tensor: (R, …).
        count: of the rows, at most R.
    """

    tensor: SourceTensor
    count: int

    @property
    def dtype(self) -> str:
        """safetensors' name of the element type."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return (self.count, *self.tensor.shape[1:])

    def blocks(self) -> Iterator[Tensor]:
        """Yield the elements in order as flat tensors."""
        left = math.prod(self.shape)
        for block in self.tensor.blocks():
            yield block[:left]
            left -= min(left, block.numel())
            if not left:
                return

    def at(self, index: int) -> SourceTensor:
        """Return the sub-tensor at an index of the first dimension."""
        return self.tensor.at(index)

    def stored(self) -> list[StoredTensor] | None:
        """Return the part of a file that holds its bytes, if its tensor lies in one."""
        stored = self.tensor.stored() if isinstance(self.tensor, InFiles) else None
        if stored is None or len(stored) != 1:
            return None
        [whole] = stored
        length = whole.length // self.tensor.shape[0] * self.count
        return [replace(whole, shape=self.shape, length=length)]


def fill(place: Tensor, tensor: SourceTensor) -> None:
    """Copy a tensor's elements into another of its shape, contiguous and of any type."""
    flat, start = place.view(-1), 0
    for block in tensor.blocks():
        flat[start : start + block.numel()] = block
        start += block.numel()


def row_blocks(tensor: SourceTensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield all rows of a tensor in order as (first row, rows in dtype).

    Each block lies in the place of the one before.
    """
    count, width = tensor.shape[0], math.prod(tensor.shape[1:])
    rows = min(count, max(1, BLOCK_ELEMENTS // max(1, width)))
    buffer = torch.empty(rows * width, dtype=dtype)
    first = filled = 0
    for block in tensor.blocks():
        while block.numel():
            taken = min(block.numel(), buffer.numel() - filled)
            buffer[filled : filled + taken] = block[:taken]
            filled, block = filled + taken, block[taken:]
            if filled == buffer.numel():
                yield first, buffer.view(rows, *tensor.shape[1:])
                first, filled = first + rows, 0
    if filled:
        yield first, buffer[:filled].view(-1, *tensor.shape[1:])


def gather_rows(tensor: SourceTensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some rows (n, …) in dtype; the tensor is read once, in order.

    Args:
        tensor: (R, …).
        index: (n,) int64, ascending, each 0 … R − 1.
        dtype: of the result.
    """
    result = torch.empty(len(index), *tensor.shape[1:], dtype=dtype)
    for first, rows in row_blocks(tensor, dtype):
        inside = (index >= first) & (index < first + len(rows))
        result[inside] = rows[index[inside] - first]
    return result
