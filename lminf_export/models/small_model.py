"""Small random instances of a model, for tests that run its own code.

Sizes that only cost time and memory are cut; the kinds of layers and the head size stay.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lminf_export.errors import ModelError
from lminf_export.models.base import build_model
from lminf_export.models.expert_facts import GROUP_COUNT_NAME, TOP_K_NAMES
from lminf_export.models.remote_code import new_model

# Sizes that affect cost only, by the names that configurations use.
_SMALL = {
    "vocab_size": 67,
    "intermediate_size": 32,
    "ffn_dim": 32,
    "n_inner": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "sliding_window": 7,
}
_MOST_LAYERS = 8
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MOST_EXPERTS = 16


def small_config(config: Any) -> Any:
    """Return a small copy of a configuration, of full width if a narrow one cannot be built."""
    small = _shrunk(config)
    try:
        build_model(small, torch.float32, device="meta")
    except ModelError:
        return _shrunk(config, narrow=False)
    return small


def _shrunk(config: Any, *, narrow: bool = True) -> Any:
    """Return a copy with small sizes and few layers, among them every kind of layer."""
    small = copy.deepcopy(config)
    for name, value in _SMALL.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(value, getattr(small, name)))
    if isinstance(getattr(small, "pad_token_id", None), int):
        small.pad_token_id = 0  # an index into the embeddings, of which few are left
    if narrow:
        _narrow(small)
        _fewer_experts(small)
    count = config.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(small).items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }
    kept = _layers_of_every_kind(list(zip(*lists.values(), strict=True)), count)
    small.num_hidden_layers = kept
    for name, entries in lists.items():
        setattr(small, name, entries[:kept])
    return small


def _narrow(config: Any) -> None:
    """Keep two key/value heads and the head's size; the model's width follows."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if groups > 2 and heads % groups == 0:
        config.hidden_size = 2 * (heads // groups) * head_dim
        config.num_attention_heads = 2 * (heads // groups)
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = 2


def _fewer_experts(config: Any) -> None:
    """Keep a few experts, in groups of equal size, as many as a token asks for."""
    groups = getattr(config, GROUP_COUNT_NAME, None) or 1
    if not isinstance(groups, int) or _MOST_EXPERTS % groups:
        return
    for name in (*_EXPERT_COUNTS, *TOP_K_NAMES):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > _MOST_EXPERTS:
            setattr(config, name, _MOST_EXPERTS)


def _layers_of_every_kind(rows: list[Any], count: int) -> int:
    """Return how many of the first layers include every kind; each row describes one layer."""
    first: dict[str, int] = {}
    for layer, row in enumerate(map(repr, rows)):
        first.setdefault(row, layer)
    return min(count, max(2, 1 + max(first.values(), default=0)), _MOST_LAYERS)


def random_model(config: Any, most_parameters: int) -> nn.Module:
    """Build a model with random parameters, norms included: weights of one would hide a norm.

    Raises:
        ModelError: it would have more parameters than `most_parameters`.
    """
    empty = build_model(config, torch.float32, device="meta")
    count = sum(parameter.numel() for parameter in empty.parameters())
    if count > most_parameters:
        raise ModelError(
            f"it has no test of its own, and its smallest form has {count} parameters, too many "
            f"for the probe that would take its place"
        )
    model = build_model(config, torch.float32, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def stock_model(config: Any, attention: str) -> nn.Module:
    """Build a model of transformers in float32 with one of its own attentions."""
    return new_model(config, dtype=torch.float32, attn_implementation=attention).eval()
