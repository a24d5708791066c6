"""Blocks of weights: float32 rows to packed integers and scales, by onnxruntime's own quantiser.

Letters: N rows (output features), K columns (input features), M blocks of a row. The layout is
that of onnxruntime's MatMulNBits: every row is cut into M = ⌈K / block_size⌉ blocks, the last
one padded; two 4-bit integers share a byte, the first in its low half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.capi import _pybind_state as ort_native


@dataclass(frozen=True)
class BlockFormat:
    """How a weight (N, K) is stored.

    Attributes:
        rows: N.
        columns: K.
        bits: 4 or 8.
        block_size: columns that share a scale.
        symmetric: no zero points; the integer 2^(bits − 1) stands for zero.
        offsets: every block has a number that is added to all its weights.
    """

    rows: int
    columns: int
    bits: int
    block_size: int
    symmetric: bool
    offsets: bool = False

    @cached_property
    def blocks(self) -> int:
        """M, blocks of a row."""
        return -(-self.columns // self.block_size)

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """(N, M, bytes of a block), uint8."""
        return (self.rows, self.blocks, self.block_size * self.bits // 8)

    @property
    def scales_shape(self) -> tuple[int, int]:
        """(N, M)."""
        return (self.rows, self.blocks)

    @property
    def zero_points_shape(self) -> tuple[int, int]:
        """(N, bytes of a row's zero points), uint8."""
        return (self.rows, -(-self.blocks * self.bits // 8))


@dataclass(frozen=True)
class Blocks:
    """Some rows of a quantised weight.

    Attributes:
        packed: (R, M, bytes of a block) uint8.
        scales: (R, M) float32.
        zero_points: (R, bytes) uint8; None where symmetric.
        offsets: (R, M) float32; None for none.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    offsets: NDArray[np.float32] | None = None


def quantize_rows(rows: torch.Tensor, form: BlockFormat) -> Blocks:
    """Quantise rows (R, K) float32, each block to the nearest of its 2^bits levels."""
    count = rows.shape[0]
    packed = np.zeros((count, *form.packed_shape[1:]), np.uint8)
    scales = np.zeros((count, form.blocks), np.float32)
    zero_points = np.zeros((count, form.zero_points_shape[1]), np.uint8)
    quantize = {4: ort_native.quantize_matmul_4bits, 8: ort_native.quantize_matmul_8bits}[form.bits]
    # onnxruntime's quantiser takes (K, R) and flat scales and zero points.
    quantize(
        packed,
        rows.t().contiguous().numpy(),
        scales.reshape(-1),
        zero_points.reshape(-1),
        form.block_size,
        count,
        form.columns,
        form.symmetric,
    )
    return Blocks(packed, scales, None if form.symmetric else zero_points)


def dequantize_rows(blocks: Blocks, form: BlockFormat) -> NDArray[np.float32]:
    """Return the float32 rows (R, K) that blocks stand for."""
    integers = _unpacked(blocks.packed, form.bits)
    zero: NDArray[np.float32] | float = 2.0 ** (form.bits - 1)
    if blocks.zero_points is not None:
        zero = _unpacked(blocks.zero_points, form.bits)[:, : form.blocks, None].astype(np.float32)
    scaled = (integers.astype(np.float32) - zero) * blocks.scales[:, :, None].astype(np.float32)
    if blocks.offsets is not None:
        scaled += blocks.offsets[:, :, None]
    return scaled.reshape(len(scaled), -1)[:, : form.columns]


def as_signed(packed: NDArray[np.uint8], form: BlockFormat) -> NDArray[np.uint8]:
    """Turn symmetric blocks of 4 bits into rows (R, K / 2) of two's complement, without padding.

    That is how ONNX stores tensors of INT4: every integer 8 less, its top bit flipped.
    """
    flipped = (packed ^ np.uint8(0x88)).reshape(len(packed), -1)
    return np.ascontiguousarray(flipped[:, : form.columns // 2])


def as_unsigned(rows: NDArray[np.uint8], form: BlockFormat) -> NDArray[np.uint8]:
    """Undo `as_signed`: (R, M, bytes of a block), padding filled with what stands for zero."""
    padded = np.zeros((len(rows), form.packed_shape[1] * form.packed_shape[2]), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return (padded ^ np.uint8(0x88)).reshape(len(rows), *form.packed_shape[1:])


def packed_integers(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Put integers (…, an even number) of 4 bits two into a byte; those of 8 bits are bytes."""
    if bits == 8:
        return integers
    return np.bitwise_or(integers[..., 0::2], integers[..., 1::2] << np.uint8(4), dtype=np.uint8)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Spread 4-bit integers over bytes, along the last axis."""
    if bits == 8:
        return packed
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)
