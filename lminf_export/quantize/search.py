"""Blocks whose scales are rounded first, those of 4 bits searched for the least squared error.

For the integers d = q − z of a block, the best scale is s = Σ w·d / Σ d², and what is left of Σ w²
with it is Σ w² − (Σ w·d)² / Σ d²: a candidate is judged by two sums. Candidates are ranges of a
block, from somewhat narrower than its extremes on: a level less at the ends, where few weights are,
is a finer grid for all others. The best candidate's scale is then fitted, rounded to the
type it is stored in, and its weights are rounded to it.

Everything is computed in pieces that stay in a processor's cache, a few rows at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lminf_export.quantize.formats import BlockFormat, Blocks, packed_integers
from lminf_export.tensors.torch_dtypes import torch_dtype

# Parts of a block's range that are tried, in its order; the widest comes first, and stays where
# no other is better.
FACTORS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 1.04)
LEVELS = 16
_CENTRE = 8.0
# Elements of a piece: its few copies fit into the second-level cache.
PIECE = 2**15
_FITS = 2


def searched_rows(
    rows: Tensor, form: BlockFormat, scales: str, *, positive: bool = False
) -> Blocks:
    """Quantise rows (R, K) float32 to blocks of 4 bits.

    Args:
        rows: the weights.
        form: of 4 bits, without offsets.
        scales: element type the scales are rounded to.
        positive: no scale is negative, which symmetric blocks may otherwise have.
    """
    count, size = len(rows), form.block_size
    blocks = _blocks(rows, form).reshape(-1, size)
    integers = torch.empty(blocks.shape, dtype=torch.uint8)
    found_scales = torch.empty(len(blocks))
    zeros = torch.empty(len(blocks), dtype=torch.uint8)
    step = max(1, PIECE // size)
    for start in range(0, len(blocks), step):
        piece = slice(start, start + step)
        scale, zero = fit(blocks[piece], scales, form.symmetric, positive)
        found = levels(blocks[piece], scale, zero)
        integers[piece] = found.to(torch.uint8)
        found_scales[piece], zeros[piece] = scale, zero.to(torch.uint8)
    shape = form.packed_shape
    packed = packed_integers(integers.numpy(), 4).reshape(count, *shape[1:])
    return Blocks(
        packed,
        found_scales.reshape(count, -1).numpy(),
        None if form.symmetric else packed_zero_points(zeros.reshape(count, -1)),
    )


def rounded_rows(rows: Tensor, form: BlockFormat, scales: str) -> Blocks:
    """Quantise rows (R, K) float32 to blocks of 8 bits; scales are rounded before the weights are.

    A symmetric block reaches from −127 to 127 around 128, an asymmetric one from 0 to 255.
    """
    blocks = _blocks(rows, form)
    low, high = blocks.amin(2).clamp_(max=0), blocks.amax(2).clamp_(min=0)
    dtype = torch_dtype(scales)
    largest = torch.maximum(high, -low)
    exact = largest / 127 if form.symmetric else (high - low) / 255
    scale = exact.to(dtype).to(torch.float32)
    zero = torch.full_like(scale, 128)
    if not form.symmetric:
        zero = (-low * inverse(scale)).round_().clamp_(0, 255)
    levels = (blocks * inverse(scale)[:, :, None]).round_().add_(zero[:, :, None]).clamp_(0, 255)
    return Blocks(
        levels.to(torch.uint8).numpy(),
        scale.numpy(),
        None if form.symmetric else zero.to(torch.uint8).numpy(),
    )


def fit(
    blocks: Tensor, scales: str, symmetric: bool, positive: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the scales and zero points (B,) float32 of blocks (B, size) float32.

    Args:
        blocks: the weights.
        scales: element type of the scales; they are returned as it rounds them.
        symmetric: all zero points are 8; scales have either sign.
        positive: but not these.
    """
    low, high = blocks.amin(1).clamp_(max=0), blocks.amax(1).clamp_(min=0)
    largest = torch.maximum(high, -low)
    best = torch.full_like(low, -1.0)
    scale, zero = torch.ones_like(low), torch.full_like(low, _CENTRE)
    for factor in FACTORS:
        for sign in (-1, 1) if symmetric and not positive else (1,):
            if symmetric:
                tried, point = largest * (sign * factor / _CENTRE), zero
            else:
                tried = (high - low) * (factor / (LEVELS - 1))
                middle = (low + high) * -0.5 * inverse(tried)
                point = (middle + (LEVELS - 1) / 2).round_().clamp_(0, LEVELS - 1)
            gain, fitted = _gain(blocks, tried, point)
            better = gain > best
            best = torch.where(better, gain, best)
            scale = torch.where(better, fitted, scale)
            zero = torch.where(better, point, zero)
    for _ in range(_FITS):
        gain, fitted = _gain(blocks, scale, zero)
        scale = torch.where(gain >= best, fitted, scale)
        best = torch.maximum(gain, best)
    return scale.to(torch_dtype(scales)).to(torch.float32), zero


def _gain(blocks: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of the sum of squares integers explain, and the scale that fits them."""
    found = levels(blocks, scale, zero).sub_(zero[:, None])
    along = torch.linalg.vecdot(found, blocks)
    square = torch.linalg.vecdot(found, found)
    fitted = along * inverse(square)
    return along * fitted, fitted


def packed_zero_points(zeros: Tensor) -> NDArray[np.uint8]:
    """Pack zero points (R, M) uint8 of 4 bits as MatMulNBits has them: (R, ⌈M / 2⌉)."""
    if zeros.shape[1] % 2:
        zeros = torch.nn.functional.pad(zeros, (0, 1))
    return packed_integers(zeros.numpy(), 4)


def levels(blocks: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the nearest integers 0 … 15 of blocks (B, size), as floats."""
    return (blocks * inverse(scale)[:, None]).round_().add_(zero[:, None]).clamp_(0, LEVELS - 1)


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 where that is no number."""
    return torch.where(scale == 0, 0, 1 / scale).nan_to_num_(0, 0, 0)


def _blocks(rows: Tensor, form: BlockFormat) -> Tensor:
    """Cut rows (R, K) into blocks (R, M, size), the last one padded with zeros."""
    missing = form.blocks * form.block_size - form.columns
    whole = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return whole.reshape(len(rows), form.blocks, form.block_size)
