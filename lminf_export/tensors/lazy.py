"""Lazy tensors: computed while they are written, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# float32 elements of one block; intermediate results take a few times as much memory.
BLOCK_ELEMENTS = 2**21


class LazyTensor:
    """A float32 `SourceTensor` computed on demand; a subclass gives `shape` and `rows`."""

    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Compute the float32 sub-tensor of the rows start … stop − 1."""
        raise NotImplementedError

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the elements in order as flat tensors."""
        count = self.shape[0]
        step = max(1, BLOCK_ELEMENTS // max(1, math.prod(self.shape[1:])))
        for start in range(0, count, step):
            yield self.rows(start, min(count, start + step)).flatten()

    def at(self, index: int) -> LazyTensor:
        """Return the sub-tensor at an index of the first dimension."""
        return LazyRow(self, index)


@dataclass(frozen=True)
class LazyRow(LazyTensor):
    """One row of a lazy tensor."""

    whole: LazyTensor
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.whole.shape[1:]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Compute its elements, or its own rows, from start to stop − 1."""
        return self.whole.rows(self.index, self.index + 1)[0][start:stop]
