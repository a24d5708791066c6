"""MXFP4 as gpt-oss ships its experts: 4-bit floats, 32 of them under one power of two.

A stack of matrices (E, out, in) is stored as `NAME_blocks` (E, out, in/32, 16) uint8, two numbers
a byte, the lower half first, and `NAME_scales` (E, out, in/32) uint8, exponents with a bias of
127. The model multiplies by it transposed, so it is (E, in, out) here, as transformers has it.
Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lminf_export.checkpoint.conversion import Stacked
from lminf_export.checkpoint.dequantize.common import Found, require
from lminf_export.checkpoint.dequantize.fp4 import unpacked
from lminf_export.tensors.lazy import LazyTensor
from lminf_export.tensors.stored import RawTensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP, _BIAS = 32, 127


def find(checkpoint: Mapping[str, RawTensor], _: Mapping[str, Any]) -> Found:
    """Describe every MXFP4 stack of a checkpoint.

    Raises:
        ModelError: a stack lacks its scales, or they do not fit.
    """
    found = Found()
    for name, blocks in checkpoint.items():
        if not name.endswith(_BLOCKS):
            continue
        target = name.removesuffix(_BLOCKS)
        scales = require(checkpoint, target + _SCALES, name)
        fits = (
            len(blocks.shape) == 4
            and blocks.shape[3] == _GROUP // 2
            and scales.shape == blocks.shape[:3]
            and blocks.dtype == scales.dtype == "U8"
        )
        found.check(fits, name, target + _SCALES, checkpoint)
        matrices = (Mxfp4Matrix(blocks, scales, index) for index in range(blocks.shape[0]))
        found.add(target, Stacked(tuple(matrices)), name, target + _SCALES)
    return found


@dataclass(frozen=True)
class Mxfp4Matrix(LazyTensor):
    """The matrix of one expert, (in, out)."""

    packed: RawTensor
    scales: RawTensor
    expert: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        _, out, groups, _ = self.packed.shape
        return groups * _GROUP, out

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the groups that hold these inputs, of every output."""
        groups = slice(start // _GROUP, -(-stop // _GROUP))
        packed = self.packed.part(self.expert, slice(None), groups)
        exponent = self.scales.part(self.expert, slice(None), groups).to(torch.int32) - _BIAS
        values = torch.ldexp(unpacked(packed), exponent[..., None])
        offset = groups.start * _GROUP
        return values.flatten(1)[:, start - offset : stop - offset].T
