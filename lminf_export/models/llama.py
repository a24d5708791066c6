"""Llama: rotary embedding in half-split pairs, grouped key/value heads, one rule for all layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lminf_export.bindings import LayerSpec
from lminf_export.config import LambdaConfig
from lminf_export.errors import ModelError
from lminf_export.models.base import (
    AttentionPlan,
    NoRotaryEmbedding,
    Rotation,
    replaced,
    unrotated,
)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Llama:
    """Adapter of `LlamaForCausalLM`."""

    model_types: tuple[str, ...] = ("llama",)

    def training_length(self, config: Any) -> int | None:
        """Return the length before any rotary extension."""
        rope = config.rope_parameters or {}
        original = rope.get("original_max_position_embeddings")
        return original or config.max_position_embeddings

    def plan(self, config: Any, settings: LambdaConfig) -> AttentionPlan:
        """Give every layer the same Λ rule."""
        head_dim = getattr(config, "head_dim", None)
        layer = LayerSpec(
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            window_size=settings.window_size,
            num_sink_tokens=settings.num_sink_tokens,
            distance_limit=settings.distance_limit,
            ring_capacity=settings.ring_capacity,
        )
        count = config.num_hidden_layers
        return AttentionPlan(
            layers=(layer,) * count,
            num_attention_heads=config.num_attention_heads,
            rotations=(_rotation(config),),
            layer_rotation=(0,) * count,
        )

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take the rotation out of the model's own code."""
        code = sys.modules[type(model).__module__]
        with ExitStack() as stack:
            stack.enter_context(replaced(code, "apply_rotary_pos_emb", unrotated))
            stack.enter_context(replaced(model.model, "rotary_emb", NoRotaryEmbedding()))
            yield


def _rotation(config: Any) -> Rotation:
    """Read the frequencies as the model itself computes them, on the CPU."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"rotary scaling {kind!r} of this llama model is not supported; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    rotary = LlamaRotaryEmbedding(config)
    return Rotation(rotary.inv_freq.float(), float(rotary.attention_scaling))
