"""MPT and BLOOM: no rotation, a bias that grows with distance (ALiBi), and no attention interface.

Their attention modules get a forward of ours while the model is patched: project, attend, project
back. Bias tables and masks are not built at all, so neither their size nor a limit on it (MPT has
one, `max_seq_len`) reaches the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.base import (
    AnyWeights,
    AttentionPlan,
    GetModel,
    attend,
    lambda_layers,
    replaced,
)
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


def bloom_slopes(num_heads: int) -> Tensor:
    """Return BLOOM's slopes (H,) float32, by its own table: the bias of position 1."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    two_tokens = torch.ones(1, 2, dtype=torch.int64)
    return build_alibi_tensor(two_tokens, num_heads, torch.float32)[:, 0, 1].clone()


def mpt_slopes(num_heads: int) -> Tensor:
    """Return MPT's slopes (H,) float32, by its own table: minus the bias of distance 1."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    return -build_mpt_alibi_tensor(num_heads, 2)[:, 0, 0].clone()


class MptFamily(AnyWeights):
    """Adapter of MPT."""

    model_types: tuple[str, ...] = ("mpt",)

    def training_length(self, config: Any) -> int | None:
        """See `Family.training_length`."""
        return int(config.max_seq_len)

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Apply Λ to every layer."""
        slopes = mpt_slopes(config.num_attention_heads)
        return alibi_plan(config, settings, slopes, notices=_mpt_notices(config))

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take bias table, mask and attention out of the model's own code."""
        code = sys.modules[type(model).__module__]
        with (
            replaced(code, "build_mpt_alibi_tensor", nothing),
            replaced(code, "create_causal_mask", _no_mpt_mask),
            replaced(code.MptAttention, "forward", _mpt_attention),
        ):
            yield


class BloomFamily(AnyWeights):
    """Adapter of BLOOM."""

    model_types: tuple[str, ...] = ("bloom",)

    def training_length(self, config: Any) -> int | None:
        """See `Family.training_length`; the configuration does not give it."""
        return None

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Apply Λ to every layer.

        Raises:
            ModelError: a setting under which transformers computes something else.
        """
        if config.slow_but_exact and config.pretraining_tp > 1:
            raise ModelError(
                "slow_but_exact=true of this bloom model: transformers then leaves out biases the "
                "model was trained with; set it to false in config.json"
            )
        return alibi_plan(config, settings, bloom_slopes(config.num_attention_heads))

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take mask and attention out of the model's own code; its bias is not read then."""
        code = sys.modules[type(model).__module__]
        with (
            replaced(code, "create_causal_mask", nothing),
            replaced(code.BloomAttention, "forward", _bloom_attention),
        ):
            yield


def nothing(*_: Any, **__: Any) -> None:
    """Take the place of a function that builds a mask or a bias."""


class _NoMask:
    """Takes the place of MPT's mask, which its code converts."""

    def to(self, *_: Any) -> None:
        return None


def _no_mpt_mask(*_: Any, **__: Any) -> _NoMask:
    return _NoMask()


def _mpt_attention(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Take the place of `MptAttention.forward`: queries, keys and values one after the other."""
    fused = self.Wqkv(hidden_states)
    if self.clip_qkv:
        fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    fused = fused.unflatten(-1, (3, self.n_heads, self.head_dim))
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(2))
    output, _weights = attend(self, query, key, value, None, scaling=self.softmax_scale)
    return self.out_proj(output.flatten(2)), None


def _bloom_attention(
    self: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Take the place of `BloomAttention.forward`: query, key and value of a head side by side."""
    fused = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, self.head_dim))
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(3))
    output, _weights = attend(self, query, key, value, None, scaling=self.inv_norm_factor)
    return residual + self.dense(output.flatten(2)), None


def _mpt_notices(config: Any) -> tuple[str, ...]:
    attention = config.attn_config
    ignored = {
        "alibi: false": not attention.alibi,
        f"alibi_bias_max: {attention.alibi_bias_max}": attention.alibi_bias_max != 8,
        "qk_ln: true": attention.qk_ln,
        "prefix_lm: true": attention.prefix_lm,
        "no_bias: false": not config.no_bias,
        f"logit_scale: {config.logit_scale}": config.logit_scale is not None,
    }
    names = ", ".join(name for name, present in ignored.items() if present)
    if not names:
        return ()
    return (
        f"transformers ignores {names} of this mpt model and so does this export: "
        f"check that it writes what the original model writes",
    )
