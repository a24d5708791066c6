"""Rounds activations in torch as onnxruntime does at accuracy level 4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def rounded_activations(model: Any, names: frozenset[str], block_size: int) -> Iterator[None]:
    """Round the inputs of a model's quantised projections, as accuracy level 4 does.

    Args:
        model: of transformers, its weights dequantised.
        names: the weights that are quantised.
        block_size: of the weights, and of the activations.
    """
    quantized = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args: (_round_blocks(args[0], block_size), *args[1:])
        )
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
