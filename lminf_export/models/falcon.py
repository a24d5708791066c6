"""Falcon: rotary or ALiBi, one, some or all key/value heads, and no attention interface.

transformers repeats the grouped keys of the newer architecture for every query head; here they
stay grouped, so a cache of Falcon-40B is 16 times smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.alibi import alibi_plan, alibi_slopes
from lminf_export.models.base import (
    AnyWeights,
    AttentionPlan,
    GetModel,
    Rotation,
    Turn,
    announce_turn,
    attend,
    lambda_layers,
    model_errors,
    nothing,
)
from lminf_export.models.internals import Internals, code_of
from lminf_export.operator.settings import LambdaConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those that do not depend on the length
_TURN = Turn("transformer.rotary_emb")
_INTERNALS = Internals("falcon models")


class FalconFamily(AnyWeights):
    """Adapter of Falcon, old and new architecture, rotary and ALiBi."""

    def training_length(self, config: Any) -> int | None:
        """Return the length before any rotary extension."""
        rope = config.rope_parameters or {}
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return int(length)

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Apply Λ to every layer.

        Raises:
            ModelError: a rotary scaling that is not supported.
        """
        heads, count = config.num_attention_heads, config.num_hidden_layers
        groups = _num_kv_heads(config)
        if config.alibi:
            # Falcon scales the bias like the products. transformers rounds slopes and bias to
            # bfloat16 on the way, which at 2,000 tokens moves a key by up to four; we do not.
            slopes = alibi_slopes(heads) * config.head_dim**-0.5
            return alibi_plan(config, settings, slopes, num_kv_heads=groups)
        with model_errors(config):
            rotation = _rotation(config)
        return AttentionPlan(
            layers=lambda_layers(config, groups, settings),
            num_attention_heads=heads,
            rotations=(rotation,),
            layer_rotation=(0,) * count,
            sliding=(False,) * count,
        )

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take rotation, bias, mask and attention out of the model's own code."""
        code = code_of(model)
        attention, rotary = _INTERNALS.members(code, "FalconAttention", "FalconRotaryEmbedding")
        with (
            _INTERNALS.replaced(code, "build_alibi_tensor", nothing),
            _INTERNALS.replaced(code, "create_causal_mask", nothing),
            _INTERNALS.replaced(rotary, "forward", nothing),
            _INTERNALS.replaced(attention, "forward", _attention),
        ):
            yield


def _num_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _rotation(config: Any) -> Rotation:
    """Compute the frequencies by the model's own class."""
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"rotary scaling {kind!r} of this falcon model is not supported; supported are "
            f"{', '.join(ROPE_TYPES)}"
        )
    module = _INTERNALS.lookup("models.falcon.modeling_falcon.FalconRotaryEmbedding")(config)
    inv_freq, scaling = _INTERNALS.members(module, "inv_freq", "attention_scaling")
    return Rotation(inv_freq.float(), float(scaling))


def _attention(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Take the place of `FalconAttention.forward`: groups of queries, each with a key and a value.

    Multi-query attention is one group, plain attention a group for each head.
    """
    config, project, dense = _INTERNALS.members(self, "config", "query_key_value", "dense")
    heads, head_dim, scale = _INTERNALS.members(self, "num_heads", "head_dim", "inv_norm_factor")
    groups = _num_kv_heads(config)
    width = heads // groups + 2
    fused = project(hidden_states).unflatten(-1, (groups, width, head_dim))
    query = fused[..., :-2, :].flatten(2, 3)
    query, key, value = (x.transpose(1, 2) for x in (query, fused[..., -2, :], fused[..., -1, :]))
    if not config.alibi:
        announce_turn(_TURN)
    output, _weights = attend(self, query, key, value, None, scaling=scale)
    return dense(output.flatten(2)), None
