"""Undoes what a conversion to GGUF does to tensors besides renaming, without reading them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.tensors.gguf_blocks import GgufTensor
from lminf_export.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class Shifted(LazyTensor):
    """A tensor plus a constant: norms that a model computes with 1 + weight are stored so."""

    tensor: LazyTensor
    by: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Add the constant."""
        return self.tensor.rows(start, stop) + self.by


@dataclass(frozen=True)
class Interleaved(LazyTensor):
    """Two tensors of one shape, alternating along one dimension: a0 b0 a1 b1 …"""

    first: LazyTensor
    second: LazyTensor
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        shape = list(self.first.shape)
        shape[self.dim] *= 2
        return tuple(shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Put the rows of both together."""
        if self.dim:
            pair = [part.rows(start, stop) for part in (self.first, self.second)]
            return torch.stack(pair, self.dim + 1).flatten(self.dim, self.dim + 1)
        low, high = start // 2, (stop + 1) // 2
        pair = [part.rows(low, high) for part in (self.first, self.second)]
        return torch.stack(pair, 1).flatten(0, 1)[start - 2 * low : stop - 2 * low]

    def at(self, index: int) -> LazyTensor:
        """Return the sub-tensor at an index of the first dimension."""
        if not self.dim:
            return super().at(index)
        return Interleaved(self.first.at(index), self.second.at(index), self.dim - 1)


def halves_from_pairs(tensor: GgufTensor, heads: int) -> GgufTensor:
    """Return projection rows (heads · D, K) in the order of transformers.

    GGUF's llama rotates neighbouring elements, transformers' element i with i + D/2. So rows
    0, D/2, 1, D/2 + 1 … of a head follow one another in the file.
    """
    rows = _count(tensor)
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2)
    return tensor.reordered(order.ravel())


def heads_from_parts(tensor: GgufTensor, heads: int) -> GgufTensor:
    """Return fused rows (3 · heads · D, K), all queries, all keys, all values, head by head."""
    rows = _count(tensor)
    order = np.arange(rows).reshape(3, heads, rows // heads // 3).swapaxes(0, 1)
    return tensor.reordered(order.ravel())


def groups_from_parts(tensor: GgufTensor, heads: int, groups: int) -> GgufTensor:
    """Return fused rows, all queries, all keys, all values, group by group.

    Args:
        tensor: ((heads + 2 · groups) · D, K).
        heads: of queries.
        groups: of keys and values; each has heads/groups queries, then its key and its value.
    """
    width = _count(tensor) // (heads + 2 * groups)
    index: NDArray[np.int64] = np.arange(_count(tensor)).reshape(-1, width)
    queries = index[:heads].reshape(groups, heads // groups, width)
    keys, values = index[heads : heads + groups], index[heads + groups :]
    return tensor.reordered(np.concatenate([queries, keys[:, None], values[:, None]], 1).ravel())


def _count(tensor: GgufTensor) -> int:
    """Return the rows of a matrix, or the elements of a vector."""
    return tensor.shape[0]
