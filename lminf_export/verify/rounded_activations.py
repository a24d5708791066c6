"""Rounds activations in torch as onnxruntime does at accuracy level 4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.tensors.stored import StoredTensor


@dataclass(frozen=True)
class RoundedInput:
    """The activations that a quantised weight meets.

    Attributes:
        block_size: of the weight, and of the activations.
        offsets: (N, blocks) of the weight, which meet activations that are not rounded; None for
            none.
    """

    block_size: int
    offsets: StoredTensor | None


@contextmanager
def rounded_activations(model: Any, inputs: Mapping[str, RoundedInput]) -> Iterator[None]:
    """Round the inputs of a model's quantised projections, as accuracy level 4 does.

    Args:
        model: of transformers, its weights dequantised.
        inputs: of the weights that are quantised, by name.
    """
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in inputs:
                rounding = _Rounding(inputs[f"{name}.weight"])
                hooks.callback(module.register_forward_pre_hook(rounding.before).remove)
                hooks.callback(module.register_forward_hook(rounding.behind).remove)
        yield


@dataclass
class _Rounding:
    """Hooks of one projection."""

    input: RoundedInput
    _lost: list[Tensor] = field(default_factory=list)

    def before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Round the input."""
        x, size = inputs[0], self.input.block_size
        rounded = _round_blocks(x, size)
        if self.input.offsets is not None:
            self._lost.append(_blocks(x - rounded, size).sum(-1))
        return (rounded, *inputs[1:])

    def behind(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add what offsets make of the part that was rounded off."""
        if self.input.offsets is None:
            return output
        lost = self._lost.pop()
        return output + nn.functional.linear(lost, self.input.offsets.load().to(lost.dtype))


def _blocks(x: Tensor, size: int) -> Tensor:
    """Cut activations (…, K) into blocks (…, ⌈K / size⌉, size), the last padded with zeros."""
    return nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _round_blocks(x: Tensor, block_size: int) -> Tensor:
    """Round activations (…, K) to int8, each block of K by its largest element."""
    padded = _blocks(x, block_size)
    scale = padded.abs().amax(-1, keepdim=True) / 127
    integers = torch.where(scale > 0, padded / scale, torch.zeros_like(padded)).round()
    return (integers * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
