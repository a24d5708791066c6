"""FP4 weights in blocks with a scale each: NVFP4 of modelopt and of compressed-tensors.

A weight (out, in), or a stack (E, out, in), is stored as uint8 (…, in / 2), two numbers of E2M1 a
byte, the lower half first. Every block of 16 inputs has a scale in FP8 (E4M3), and the whole matrix
one more in float32. modelopt names them `NAME_scale` and `NAME_scale_2` and multiplies by both;
compressed-tensors names them `weight_scale` and `weight_global_scale` beside `weight_packed` and
divides by the latter. Its MXFP4 has blocks of 32 with a power of two (E8M0) and no second scale.

Scales of activations (`input_scale`, `input_global_scale`) are ignored: activations are not
quantised here. A `pre_quant_scale` multiplies the inputs of a matrix, which its columns take over.
Source: NVIDIA's "Introducing NVFP4" and OCP Microscaling Formats (MX) 1.0, section 5.3.3 (E2M1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lminf_export.checkpoint.conversion import Stacked
from lminf_export.checkpoint.dequantize.common import Found, require
from lminf_export.checkpoint.dequantize.scaled import as_factor
from lminf_export.errors import ModelError
from lminf_export.tensors.lazy import LazyTensor
from lminf_export.tensors.stored import RawTensor, SourceTensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor([*_MAGNITUDES, *(-x for x in _MAGNITUDES)])
# Inputs of a block.
_BLOCKS = (16, 32)
# Behind the name of a weight, and behind that of a stack of experts which is a parameter itself.
_SCALES = ("_scale", "_weight_scale")
_PACKED = ".weight_packed"


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Return the float32 numbers (…, 2n) of bytes (…, n), the lower half of each first."""
    return _E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()]


def find_modelopt(checkpoint: Mapping[str, RawTensor], _: Mapping[str, Any]) -> Found:
    """Describe every FP4 weight of a checkpoint of modelopt.

    Raises:
        ModelError: a scale is missing or does not fit.
    """
    found = Found()
    for name, packed in checkpoint.items():
        if packed.dtype != "U8":
            continue
        scale = next((name + x for x in _SCALES if name + x in checkpoint), name + _SCALES[0])
        second = f"{scale}_2"
        for part in (scale, second):
            require(checkpoint, part, name)
        columns = f"{name.rpartition('.')[0]}.pre_quant_scale"
        tensor = _weight(found, checkpoint, name, scale, second, columns)
        found.add(name, tensor, name, scale, second, columns)
    return found


def find_compressed(checkpoint: Mapping[str, RawTensor], _: Mapping[str, Any]) -> Found:
    """Describe every FP4 weight of a checkpoint of compressed-tensors.

    Raises:
        ModelError: a scale is missing or does not fit, or there are zero points.
    """
    found = Found()
    for name, packed in checkpoint.items():
        if not name.endswith(_PACKED) or packed.dtype != "U8":
            continue
        base = name.removesuffix(_PACKED)
        if f"{base}.weight_zero_point" in checkpoint:
            raise ModelError(
                f"{name} has zero points ({base}.weight_zero_point), which FP4 is not read with; "
                f"export the unquantised checkpoint instead"
            )
        scale, whole = f"{base}.weight_scale", f"{base}.weight_global_scale"
        is_power = require(checkpoint, scale, name).dtype in ("U8", "F8_E8M0")
        if not is_power:
            require(checkpoint, whole, name)
        tensor = _weight(found, checkpoint, name, scale, whole, None, divides=True)
        found.add(f"{base}.weight", tensor, name, scale, whole, f"{base}.input_global_scale")
    return found


def _weight(
    found: Found,
    checkpoint: Mapping[str, RawTensor],
    name: str,
    scale: str,
    whole: str,
    columns: str | None,
    *,
    divides: bool = False,
) -> SourceTensor:
    """Describe a weight, or a stack of them."""
    packed, scales = checkpoint[name], checkpoint[scale]
    factor, inputs = checkpoint.get(whole), checkpoint.get(columns or "")
    shape = (*packed.shape[:-1], 2 * packed.shape[-1]) if packed.shape else (0,)
    blocks = [(*shape[:-1], shape[-1] // size) for size in _BLOCKS if shape[-1] % size == 0]
    found.check(len(shape) in (2, 3) and scales.shape in blocks, name, scale, checkpoint)
    stack = shape[0] if len(shape) == 3 else 1
    if factor is not None:
        fits = math.prod(factor.shape) in (1, stack) and factor.dtype == "F32"
        found.check(fits, name, whole, checkpoint)
    if inputs is not None and columns is not None:
        found.check(math.prod(inputs.shape) == shape[-1], name, columns, checkpoint)
    places = range(stack) if len(shape) == 3 else (None,)
    parts = tuple(Fp4Matrix(packed, scales, factor, divides, inputs, place) for place in places)
    return Stacked(parts) if len(shape) == 3 else parts[0]


@dataclass(frozen=True)
class Fp4Matrix(LazyTensor):
    """A matrix (out, in), or one of a stack.

    Attributes:
        packed: (out, in / 2) or (E, out, in / 2).
        scales: (out, blocks) or (E, out, blocks).
        factor: one number for all, or one for each matrix; None for 1.
        divides: divide by the factor.
        inputs: (in,) further factors of the columns, or None.
        index: place in the stack; None for a matrix.
    """

    packed: RawTensor
    scales: RawTensor
    factor: RawTensor | None
    divides: bool
    inputs: RawTensor | None
    index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.packed.shape[-2], 2 * self.packed.shape[-1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the rows and multiply each block by its scales."""
        place = () if self.index is None else (self.index,)
        part = (*place, slice(start, stop))
        values = unpacked(self.packed.part(*part))
        scales = as_factor(self.scales.part(*part))
        if self.factor is not None:
            factors = self.factor.part().to(torch.float32).flatten()
            factor = factors[self.index if self.index and len(factors) > 1 else 0]
            scales = scales / factor if self.divides else scales * factor
        block = self.shape[1] // scales.shape[1]
        values = values * scales.repeat_interleave(block, 1)
        if self.inputs is not None:
            values = values * self.inputs.part().to(torch.float32).flatten()
        return values
