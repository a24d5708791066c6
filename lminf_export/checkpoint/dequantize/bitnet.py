"""BitNet's ternary weights: packed four to a byte, or as the full numbers they are made from.

Packed ("offline"), a weight (out, in) is uint8 (out / 4, in), whose lowest two bits are the first
quarter of the rows, plus one, and `weight_scale`, which `BitLinear` divides by and
`AutoBitLinear` multiplies by. "Online" checkpoints hold master weights; each matrix is rounded to
−1, 0, 1 times its mean magnitude whenever it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lminf_export.checkpoint.dequantize.common import Found, require
from lminf_export.errors import ModelError
from lminf_export.tensors.lazy import LazyTensor
from lminf_export.tensors.stored import RawTensor

_PER_BYTE, _LEAST_MEAN = 4, 1e-5


def find(checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any]) -> Found:
    """Describe every ternary matrix of a checkpoint.

    Raises:
        ModelError: a matrix lacks its scale, or the model has norms that transformers would add.
    """
    if settings.get("use_rms_norm"):
        raise ModelError(
            "use_rms_norm of this bitnet checkpoint adds norms that its model type does not have; "
            "export the unquantised checkpoint instead"
        )
    is_auto = settings.get("linear_class") == "autobitlinear"
    found = Found()
    if is_auto and settings.get("quantization_mode") == "online":
        for name, weight in checkpoint.items():
            if _is_ternary(name, weight, settings.get("modules_to_not_convert") or ("lm_head",)):
                found.add(name, OnlineTernary(weight), name)
        return found
    for name, packed in checkpoint.items():
        if packed.dtype != "U8":
            continue
        scale = f"{name}_scale"
        fits = len(packed.shape) == 2 and require(checkpoint, scale, name).shape in ((), (1,))
        found.check(fits, name, scale, checkpoint)
        found.add(name, PackedTernary(packed, checkpoint[scale], not is_auto), name, scale)
    return found


def _is_ternary(name: str, weight: RawTensor, kept: Any) -> bool:
    """Whether a tensor is the weight of a linear layer that is rounded."""
    module, _, last = name.rpartition(".")
    is_kept = any(re.match(f"{x}\\.", f"{module}.") or module.endswith(f".{x}") for x in kept)
    return last == "weight" and module.endswith("_proj") and len(weight.shape) == 2 and not is_kept


@dataclass(frozen=True)
class PackedTernary(LazyTensor):
    """A packed matrix (out, in) times its scale."""

    packed: RawTensor
    scale: RawTensor
    divides: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.packed.shape[0] * _PER_BYTE, self.packed.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the rows, quarter by quarter."""
        quarter = self.packed.shape[0]
        pieces = []
        for place in range(_PER_BYTE):
            first, last = max(start, place * quarter), min(stop, (place + 1) * quarter)
            if first < last:
                bytes_ = self.packed.part(slice(first - place * quarter, last - place * quarter))
                pieces.append((bytes_ >> (2 * place)) & 3)
        scale = self.scale.part().to(torch.float32).reshape(())
        values = torch.cat(pieces).to(torch.float32) - 1
        return values / scale if self.divides else values * scale


@dataclass(frozen=True)
class OnlineTernary(LazyTensor):
    """Master weights (out, in), rounded as they are before each use."""

    master: RawTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.master.shape

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean magnitude of the whole matrix, float32."""
        count = self.shape[0] * self.shape[1]
        total = sum(block.abs().sum(dtype=torch.float64) for block in self.master.blocks())
        return (torch.as_tensor(total) / count).to(torch.float32).clamp(min=_LEAST_MEAN)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Round the rows."""
        values = self.master.part(slice(start, stop)).to(torch.float32)
        return (values / self.mean).round().clamp(-1, 1) * self.mean
