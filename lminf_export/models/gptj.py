"""GPT-J and CodeGen: interleaved rotation of a part of each head, and no attention interface.

transformers rotates by a table of as many positions as the model was trained on, kept in every
layer. Here the rotation is the operator's, exact at any position, and the table is never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.base import (
    AnyWeights,
    AttentionPlan,
    GetModel,
    Rotation,
    Turn,
    announce_turn,
    attend,
    lambda_layers,
    nothing,
)
from lminf_export.models.internals import Internals, code_of
from lminf_export.operator.settings import LambdaConfig

_THETA = 10000  # written into transformers' code, not into the configuration
_CODEGEN_PARTS = 4  # CodeGen's fused projection keeps the split over four devices of its training
_TURN = Turn("embed_positions")
_INTERNALS = Internals("gptj and codegen models")


class GptjFamily(AnyWeights):
    """Adapter of GPT-J and CodeGen, which differ in their projections only."""

    def training_length(self, config: Any) -> int | None:
        """Return `n_positions`."""
        return int(config.max_position_embeddings)

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Apply Λ to every layer.

        Raises:
            ModelError: `rotary_dim` does not fit the heads.
        """
        heads, count = config.num_attention_heads, config.num_hidden_layers
        head_dim = config.hidden_size // heads
        rotary_dim = config.rotary_dim
        if not rotary_dim or rotary_dim % 2 or rotary_dim > head_dim:
            raise ModelError(
                f"rotary_dim={rotary_dim} of this {config.model_type} model: expected an even "
                f"number from 2 to the head size, {head_dim}"
            )
        return AttentionPlan(
            layers=lambda_layers(config, heads, settings),
            num_attention_heads=heads,
            rotations=(Rotation(_inv_freq(rotary_dim), interleaved=True),),
            layer_rotation=(0,) * count,
            sliding=(False,) * count,
        )

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take rotation, mask and attention out of the model's own code."""
        code = code_of(model)
        prefix, forward = (
            ("GPTJ", _gptj_attention)
            if hasattr(code, "GPTJAttention")
            else ("CodeGen", _codegen_attention)
        )
        attention = _INTERNALS.member(code, f"{prefix}Attention")
        table = getattr(code, f"{prefix}RotaryEmbedding", None)  # of the model, in newer versions
        with (
            _INTERNALS.replaced(code, "create_causal_mask", nothing),
            _INTERNALS.replaced(attention, "forward", forward),
            _INTERNALS.replaced(table, "forward", nothing) if table else nullcontext(),
        ):
            yield


def _inv_freq(rotary_dim: int) -> Tensor:
    """Return (R/2,) float32 frequencies, rounded as transformers' table rounds them."""
    exponent = torch.arange(0, rotary_dim, 2).to(torch.float32) / rotary_dim
    return 1.0 / _THETA**exponent


def _gptj_attention(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Take the place of `GPTJAttention.forward`."""
    shape = _INTERNALS.members(self, "num_attention_heads", "head_dim")
    query, key, value = (
        project(hidden_states).unflatten(-1, shape)
        for project in _INTERNALS.members(self, "q_proj", "k_proj", "v_proj")
    )
    return _attention(self, query, key, value)


def _codegen_attention(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Take the place of `CodeGenAttention.forward`: each part has its queries, values, keys."""
    project, heads, head_dim = _INTERNALS.members(
        self, "qkv_proj", "num_attention_heads", "head_dim"
    )
    shape = (_CODEGEN_PARTS, 3, heads // _CODEGEN_PARTS, head_dim)
    fused = project(hidden_states).unflatten(-1, shape)
    query, value, key = (x.flatten(2, 3) for x in fused.unbind(3))
    return _attention(self, query, key, value)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    """Attend with heads of shape (B, S, H, D) and project back."""
    announce_turn(_TURN)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output, _weights = attend(module, query, key, value, None, scaling=module.head_dim**-0.5)
    return _INTERNALS.member(module, "out_proj")(output.flatten(2)), None
