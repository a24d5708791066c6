"""Attention with linear biases (ALiBi): no rotation, a bias that grows with distance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lminf_export.models.base import AttentionPlan, lambda_layers
from lminf_export.operator.settings import LambdaConfig


def alibi_plan(
    config: Any,
    settings: LambdaConfig,
    slopes: Tensor,
    *,
    num_kv_heads: int | None = None,
    notices: tuple[str, ...] = (),
) -> AttentionPlan:
    """Describe a model whose layers have no window and a bias by distance.

    Args:
        config: names its heads, layers and width.
        settings: the Λ settings.
        slopes: (H,) float32, subtracted from a logit for each token of distance.
        num_kv_heads: G, as many as query heads by default.
        notices: lines for the user.
    """
    heads, count = config.num_attention_heads, config.num_hidden_layers
    return AttentionPlan(
        layers=lambda_layers(config, num_kv_heads or heads, settings),
        num_attention_heads=heads,
        rotations=(),
        layer_rotation=(None,) * count,
        alibi_slopes=slopes,
        sliding=(False,) * count,
        notices=notices,
    )


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slopes (H,) float32 that ALiBi's paper gives to H heads.

    A geometric row for a power of two; other numbers of heads go on with every second slope of
    the next power's row.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-8 * (i + 0.5) / below) for i in range(num_heads - below)]
    return torch.tensor(slopes, dtype=torch.float32)
