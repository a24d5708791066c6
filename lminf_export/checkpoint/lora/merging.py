"""A low-rank change added to a tensor while it is written, a block of whole rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lminf_export.tensors.lazy import BLOCK_ELEMENTS
from lminf_export.tensors.stored import RawTensor, SourceTensor


@dataclass(frozen=True)
class LowRank:
    """The product of two thin matrices, times a factor; one expert's of a stack of them.

    Attributes:
        down: (E · r, in), one expert after the other.
        up: (out, r · E), for each rank the columns of all experts.
        scale: of the product.
        is_transposed: the product is wanted as (in, out).
        expert: which of the experts.
        num_experts: E, 1 for a plain matrix.
    """

    down: RawTensor
    up: RawTensor
    scale: float
    is_transposed: bool = False
    expert: int = 0
    num_experts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        shape = self.up.shape[0], self.down.shape[1]
        return shape[::-1] if self.is_transposed else shape

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the left and the right factor in float32, scaled and transposed for the product."""
        rank = self.down.shape[0] // self.num_experts
        down = self.down.part(slice(self.expert * rank, (self.expert + 1) * rank))
        up = self.up.part(slice(None), slice(self.expert, None, self.num_experts))
        down, up = down.to(torch.float32), up.to(torch.float32) * self.scale
        return (down.T, up.T) if self.is_transposed else (up, down)


@dataclass(frozen=True)
class Merged:
    """A matrix with a low-rank change added; with a magnitude (DoRA) its rows get that length.

    Attributes:
        base: (rows, columns).
        change: of the same shape.
        magnitude: (rows,), or None.
    """

    base: SourceTensor
    change: LowRank
    magnitude: RawTensor | None = None

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.base.shape

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        left, right = self.change.factors()
        for start, rows in whole_rows(self.base):
            yield self._merge(rows, start, left[start : start + len(rows)] @ right).flatten()

    def at(self, index: int) -> SourceTensor:
        """Return the sub-tensor at an index of the first dimension."""
        return MergedRow(self, index)

    def row(self, index: int) -> torch.Tensor:
        """Compute one row."""
        left, right = self.change.factors()
        base = torch.cat(list(self.base.at(index).blocks())).to(torch.float32)
        return self._merge(base[None], index, left[index : index + 1] @ right)[0]

    def _merge(self, base: torch.Tensor, start: int, change: torch.Tensor) -> torch.Tensor:
        merged = base + change
        if self.magnitude is None:
            return merged
        wanted = self.magnitude.part().flatten()[start : start + len(base)].to(torch.float32)
        return merged * (wanted / merged.norm(dim=1))[:, None]


@dataclass(frozen=True)
class MergedRow:
    """One row of a merged matrix."""

    whole: Merged
    index: int

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.whole.shape[1:]

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the row."""
        yield self.whole.row(self.index)

    def at(self, index: int) -> SourceTensor:
        """Rows of a matrix have no rows."""
        raise IndexError(index)


@dataclass(frozen=True)
class Sum:
    """A vector plus another times a factor."""

    base: SourceTensor
    change: RawTensor
    scale: float

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.base.shape

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements."""
        base = torch.cat(list(self.base.blocks())).to(torch.float32)
        yield base + self.change.part().to(torch.float32) * self.scale

    def at(self, index: int) -> SourceTensor:
        """Vectors have no rows."""
        raise IndexError(index)


def whole_rows(tensor: SourceTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield a matrix as (first row, float32 rows), however its blocks are cut."""
    width, start = math.prod(tensor.shape[1:]), 0
    rest = torch.empty(0)
    for block in tensor.blocks():
        for piece in block.split(BLOCK_ELEMENTS):
            rest = torch.cat((rest, piece.to(torch.float32)))
            count = rest.numel() // width
            if count:
                yield start, rest[: count * width].unflatten(0, (count, width))
                start, rest = start + count, rest[count * width :]
