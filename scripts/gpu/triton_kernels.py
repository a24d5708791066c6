"""Yardsticks in Triton: a copy, and split-K flash decoding over a plain cache.

As anybody would write them, so that the kernels are compared with what takes an afternoon.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COPY_BLOCK = 4096
KEYS_AT_ONCE = 64
LEAST_ROWS = 16  # of tl.dot


@triton.jit
def _copy_kernel(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def copy(source: Tensor, target: Tensor) -> None:
    """Copy one tensor onto another of the same size and type."""
    grid = (triton.cdiv(source.numel(), COPY_BLOCK),)
    _copy_kernel[grid](source, target, source.numel(), BLOCK=COPY_BLOCK)


@triton.jit
def _decode_kernel(
    query, key, value, partial, stats, scale, keys, splits,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    real = rows < GROUP
    q = tl.load(query + (pair * GROUP + rows[:, None]) * D + dims, mask=real[:, None], other=0.0)
    per_split = tl.cdiv(tl.cdiv(keys, KEYS), splits) * KEYS
    begin = split * per_split
    end = tl.minimum(begin + per_split, keys)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, D], tl.float32)
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        there = at < end
        place = (pair * keys + at[:, None]) * D + dims
        k = tl.load(key + place, mask=there[:, None], other=0.0)
        v = tl.load(value + place, mask=there[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k)) * scale
        logits = tl.where(there[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        carried = tl.exp2(top - new_top)
        weights = tl.exp2(logits - new_top[:, None])
        total = total * carried + tl.sum(weights, 1)
        summed = summed * carried[:, None] + tl.dot(weights.to(v.dtype), v)
        top = new_top
    row = (pair * splits + split) * GROUP + rows
    tl.store(partial + row[:, None] * D + dims, summed, mask=real[:, None])
    tl.store(stats + row * 2, top, mask=real)
    tl.store(stats + row * 2 + 1, total, mask=real)


@triton.jit
def _combine_kernel(
    partial, stats, output, splits, GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    dims = tl.arange(0, D)
    split = tl.arange(0, SPLITS)
    there = split < splits
    at = (pair * splits + split) * GROUP + row
    tops = tl.load(stats + at * 2, mask=there, other=-float("inf"))
    totals = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
    weights = tl.exp2(tops - tl.max(tops, 0))
    part = tl.load(partial + at[:, None] * D + dims, mask=there[:, None], other=0.0)
    mean = tl.sum(part * weights[:, None], 0) / tl.sum(weights * totals, 0)
    tl.store(output + (pair * GROUP + row) * D + dims, mean.to(output.dtype.element_ty))


class Decode:
    """Flash decoding of one query over `keys` keys, split so that every multiprocessor has work.

    Args:
        batch: B.
        heads: H.
        kv_heads: G.
        keys: of every row.
        head_dim: D, a power of two.
        multiprocessors: of the device.
    """

    def __init__(
        self, batch: int, heads: int, kv_heads: int, keys: int, head_dim: int, multiprocessors: int
    ) -> None:
        self.pairs, self.group, self.keys, self.dim = (
            batch * kv_heads,
            heads // kv_heads,
            keys,
            head_dim,
        )
        wanted = max(1, 2 * multiprocessors // self.pairs)
        self.splits = min(wanted, triton.cdiv(keys, KEYS_AT_ONCE), 64)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: query (B, H, 1, D), key and value (B, G, keys, D); returns (B, H, 1, D)."""
        rows = self.pairs * self.splits * self.group
        partial = torch.empty(rows, self.dim, dtype=torch.float32, device=query.device)
        stats = torch.empty(rows, 2, dtype=torch.float32, device=query.device)
        output = torch.empty_like(query)
        scale = self.dim**-0.5 * 1.4426950408889634
        padded = max(LEAST_ROWS, triton.next_power_of_2(self.group))
        _decode_kernel[(self.pairs, self.splits)](
            query, key, value, partial, stats, scale, self.keys, self.splits,
            GROUP=self.group, D=self.dim, ROWS=padded, KEYS=KEYS_AT_ONCE,
        )  # fmt: skip
        most = triton.next_power_of_2(self.splits)
        _combine_kernel[(self.pairs, self.group)](
            partial, stats, output, self.splits, GROUP=self.group, D=self.dim, SPLITS=most
        )
        return output
