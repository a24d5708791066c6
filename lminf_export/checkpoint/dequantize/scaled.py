"""8-bit numbers times a scale: FP8 (DeepSeek, Qwen, compressed-tensors …) and plain int8.

A weight is (out, in) or a stack (E, out, in). Its scales form a grid (down, across) over each
matrix: (1, 1) is one scale for the matrix, (out, 1) one for each row, any other grid one for each
block of rows and columns. With blocks of R rows and S columns, element (i, j) is
number[i, j] · scale[i // R, j // S].

Static scales of activations are ignored: activations are not quantised here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lminf_export.checkpoint.conversion import Stacked
from lminf_export.checkpoint.dequantize.common import Found, require
from lminf_export.errors import ModelError
from lminf_export.tensors.lazy import LazyTensor
from lminf_export.tensors.stored import RawTensor, SourceTensor

NARROW = ("F8_E4M3", "F8_E5M2", "I8")
# Of keys and values in a cache of 8 bits.
CACHE_SCALES = ("k_scale", "v_scale")
# DeepSeek names the scale after its inverse, by which weights were multiplied; both are factors.
_FACTORS = ("_scale_inv", "_scale")
_ACTIVATIONS = (
    *("input_scale", "activation_scale", "output_scale", "input_global_scale"),
    *("q_scale", *CACHE_SCALES),
)
_E8M0_BIAS = 127


def find(checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any]) -> Found:
    """Describe every 8-bit tensor of a checkpoint.

    Args:
        checkpoint: its tensors.
        settings: `weight_block_size`, rows and columns of a block; without it, blocks follow from
            the scales' shape.

    Raises:
        ModelError: a tensor has no scale, or one that does not fit.
    """
    found, block_size = Found(), settings.get("weight_block_size")
    for name, weight in checkpoint.items():
        if name.rpartition(".")[2] in _ACTIVATIONS:
            found.used.add(name)
        if weight.dtype not in NARROW or not weight.shape:
            continue
        factor = next((name + x for x in _FACTORS if name + x in checkpoint), name + _FACTORS[1])
        scale = require(checkpoint, factor, name)
        if len(weight.shape) > 3 or _grid(weight, scale, block_size) is None:
            found.check(False, name, factor, checkpoint)
        zero_point = name + "_zero_point"
        if zero_point in checkpoint and weight.dtype == "I8":
            raise ModelError(f"{name} has zero points ({zero_point}), which int8 is not read with")
        found.add(name, scaled(weight, scale, block_size), name, factor, zero_point)
    return found


def scaled(weight: RawTensor, scale: RawTensor, block_size: Sequence[int] | None) -> SourceTensor:
    """Describe a matrix, or a stack of them, times its scale.

    Args:
        weight: (out, in) or (E, out, in).
        scale: any shape that `_grid` accepts.
        block_size: rows and columns of a block, or None.
    """
    grid = _grid(weight, scale, block_size)
    assert grid is not None
    block = _block(weight, grid, block_size)
    if len(weight.shape) == 2:
        return ScaledMatrix(weight, scale, grid, block)
    return Stacked(
        tuple(ScaledMatrix(weight, scale, grid, block, index) for index in range(weight.shape[0]))
    )


def _grid(
    weight: RawTensor, scale: RawTensor, block_size: Sequence[int] | None
) -> tuple[int, int] | None:
    """Return the grid of scales of each matrix, (down, across); None if they do not fit."""
    if len(weight.shape) not in (2, 3):
        return None
    rows, columns = weight.shape[-2:]
    stack = weight.shape[0] if len(weight.shape) == 3 else 1
    # Scales of a stack are (E, …), one grid for each matrix; the rest is the shape of one grid.
    shape = scale.shape[1:] if stack > 1 and scale.shape[:1] == (stack,) else scale.shape
    if stack > 1 and math.prod(scale.shape) != 1 and shape == scale.shape:
        return None  # neither one scale for all, nor a grid for each matrix
    if math.prod(shape) == 1:
        return 1, 1
    down, across = (*shape, 1) if len(shape) == 1 else shape[-2:]  # (out,) is (out, 1)
    if len(shape) > 2 or not block_size:
        return (down, across) if rows % down == 0 and columns % across == 0 else None
    # With a known block size the last blocks may be partial; scales for each row also occur.
    wanted = -(-rows // block_size[0]), -(-columns // block_size[1])
    if (down, across) == wanted or (down, across) == (rows, 1):
        return down, across
    return None


def _block(
    weight: RawTensor, grid: tuple[int, int], block_size: Sequence[int] | None
) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    rows, columns = weight.shape[-2:]
    if block_size and grid == (-(-rows // block_size[0]), -(-columns // block_size[1])):
        return block_size[0], block_size[1]
    return -(-rows // grid[0]), -(-columns // grid[1])


@dataclass(frozen=True)
class ScaledMatrix(LazyTensor):
    """A matrix (out, in), or one of a stack, times a grid of scales.

    Attributes:
        weight: (out, in) or (E, out, in), 8-bit numbers.
        scale: one number, the grid, or (E, …) with a grid for each matrix.
        grid: scales down and across.
        block: rows and columns that share a scale.
        index: place in the stack; None for a matrix.
    """

    weight: RawTensor
    scale: RawTensor
    grid: tuple[int, int]
    block: tuple[int, int]
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.weight.shape[-2:]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the rows and multiply each by its scales."""
        stack = () if self.index is None else (self.index,)
        values = self.weight.part(*stack, slice(start, stop)).to(torch.float32)
        if math.prod(self.scale.shape) == 1:  # one for all matrices of a stack
            return values * as_factor(self.scale.part()).reshape(())
        grid = as_factor(self.scale.part(*stack)).reshape(self.grid)
        down = torch.arange(start, stop) // self.block[0]
        across = torch.arange(self.shape[1]) // self.block[1]
        return values * grid[down][:, across]  # grid spread to (stop − start, in)


def as_factor(scale: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; bytes are exponents of two (E8M0)."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.to(torch.float32) - _E8M0_BIAS)
    return scale.to(torch.float32)
