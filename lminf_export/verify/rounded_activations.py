"""Rounds activations in torch as onnxruntime does at accuracy level 4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def rounded_activations(model: Any, sizes: Mapping[str, int]) -> Iterator[None]:
    """Round the inputs of a model's quantised projections, as accuracy level 4 does.

    Args:
        model: of transformers, its weights dequantised.
        sizes: block sizes of the weights that are quantised, and of the activations they meet,
            by name.
    """
    named = model.named_parameters(remove_duplicate=False)
    quantized = {id(parameter): sizes[name] for name, parameter in named if name in sizes}

    def rounding(block_size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, args: (_round_blocks(args[0], block_size), *args[1:])

    hooks = [
        module.register_forward_pre_hook(rounding(quantized[id(module.weight)]))
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in quantized
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round_blocks(x: Tensor, block_size: int) -> Tensor:
    """Round activations (…, K) to int8, each block of K by its largest element."""
    columns = x.shape[-1]
    padded = nn.functional.pad(x, (0, -columns % block_size)).unflatten(-1, (-1, block_size))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    integers = torch.where(scale > 0, padded / scale, torch.zeros_like(padded)).round()
    return (integers * scale).flatten(-2)[..., :columns].to(x.dtype)
