"""Blocks of 4 bits whose rounding errors are made up for on inputs that were seen.

The error feedback of GPTQ (arXiv 2210.17323): with H = Σ x·xᵀ over inputs x, the columns of a
weight are rounded one after the other, and the error of each is spread over the columns behind
it so that the least of it reaches the outputs. Scales and zero points of a block are searched
(`quantize.search`) when its first column is due, on its columns as they are by then.

Wide inputs are cut into sections that know nothing of each other, so that H takes bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lminf_export.quantize.formats import BlockFormat, Blocks, packed_integers
from lminf_export.quantize.search import LEVELS, fit, inverse, packed_zero_points

# Inputs that see each other: 4,096² float32 are 64 MiB, of which a few copies are needed.
SECTION = 4096
# Part of the mean of H's diagonal that is added to it: inputs that were never seen have some size.
_DAMPING = 0.01
# Rows that are rounded together.
_ROWS = 4096


@dataclass
class InputStatistics:
    """H = Σ x·xᵀ of inputs of K features, for each section of the features.

    Attributes:
        columns: K.
        block_size: sections hold whole blocks.
        sums: of the sections, (n, n) float32 each.
    """

    columns: int
    block_size: int
    sums: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = [torch.zeros(s.stop - s.start, s.stop - s.start) for s in self.sections]

    @property
    def sections(self) -> list[slice]:
        """Columns of every section, of nearly equal width."""
        blocks = -(-self.columns // self.block_size)
        count = -(-self.columns // SECTION)
        width = -(-blocks // count) * self.block_size
        starts = range(0, self.columns, width)
        return [slice(start, min(start + width, self.columns)) for start in starts]

    def add(self, inputs: Tensor) -> None:
        """Count inputs (…, K)."""
        rows = inputs.reshape(-1, self.columns).to(torch.float32)
        for total, section in zip(self.sums, self.sections, strict=True):
            part = rows[:, section]
            total.addmm_(part.T, part)


def calibrated_rows(
    rows: Tensor, form: BlockFormat, scales: str, statistics: InputStatistics, *, positive: bool
) -> Blocks:
    """Quantise rows (R, K) float32 to blocks of 4 bits, for inputs as they were counted.

    Args:
        rows: the weights.
        form: of 4 bits, without offsets.
        scales: element type the scales are rounded to.
        statistics: of the inputs.
        positive: no scale is negative.
    """
    count, size = len(rows), form.block_size
    integers = torch.zeros(count, form.blocks * size, dtype=torch.uint8)
    if form.symmetric:
        integers += LEVELS // 2
    found_scales = torch.zeros(count, form.blocks)
    zeros = torch.full((count, form.blocks), LEVELS // 2, dtype=torch.uint8)
    for total, section in zip(statistics.sums, statistics.sections, strict=True):
        factor = _feedback(total)
        for start in range(0, count, _ROWS):
            some = slice(start, start + _ROWS)
            work = rows[some, section].clone()
            for first in range(0, work.shape[1], size):
                block = (section.start + first) // size
                own = work[:, first : first + size]
                scale, zero = fit(_padded(own, size), scales, form.symmetric, positive)
                found = _round_block(work, first, own.shape[1], factor, scale, zero)
                at = section.start + first
                integers[some, at : at + own.shape[1]] = found
                integers[some, at + own.shape[1] : at + size] = zero.to(torch.uint8)[:, None]
                found_scales[some, block], zeros[some, block] = scale, zero.to(torch.uint8)
    packed = packed_integers(integers.numpy(), 4).reshape(count, *form.packed_shape[1:])
    zero_points = None if form.symmetric else packed_zero_points(zeros)
    return Blocks(packed, found_scales.numpy(), zero_points)


def _padded(block: Tensor, size: int) -> Tensor:
    missing = size - block.shape[1]
    return block.contiguous() if not missing else torch.nn.functional.pad(block, (0, missing))


def _feedback(total: Tensor) -> Tensor:
    """Return the upper Cholesky factor of H⁻¹: row j says where the error of column j goes."""
    matrix = total.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    damping = _DAMPING * float(diagonal.mean())
    while True:
        diagonal.add_(damping)
        lower, wrong = torch.linalg.cholesky_ex(matrix)
        if not wrong:
            upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not wrong:
            return upper
        damping *= 10  # inputs of fewer directions than features, and rounding


def _round_block(
    work: Tensor, first: int, width: int, factor: Tensor, scale: Tensor, zero: Tensor
) -> Tensor:
    """Round columns first … first + width − 1; pass their errors on to those behind them.

    Args:
        work: (R, K) the weights of a section; changed.
        first: of the block.
        width: columns of the block.
        factor: of `_feedback`.
        scale: (R,).
        zero: (R,).

    Returns:
        (R, width) uint8, the integers.
    """
    last = first + width
    inverted, errors = inverse(scale), torch.empty(len(work), width)
    integers = torch.empty(len(work), width, dtype=torch.uint8)
    own = factor[first:last, first:last]
    block = work[:, first:last].clone()
    for j in range(width):
        column = block[:, j]
        levels = (column * inverted).round_().add_(zero).clamp_(0, LEVELS - 1)
        integers[:, j] = levels.to(torch.uint8)
        errors[:, j] = (column - (levels - zero) * scale) / own[j, j]
        block[:, j + 1 :].addr_(errors[:, j], own[j, j + 1 :], alpha=-1)
    work[:, last:].addmm_(errors, factor[first:last, last:], alpha=-1)
    return integers
