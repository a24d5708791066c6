"""Signs of positions, convolutions and states in the modules of a model, which is not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lminf_export.models.remote_code import new_model
from lminf_export.models.transformers_tables import CODE_ERRORS

_POSITION_NAME = re.compile(r"(^|\.)(wpe|\w*positions?_embed\w*|embed_positions|pos_emb\w*)$")
_SINUSOIDAL = re.compile(r"sinusoid|positional_?(embedding|encoding)", re.IGNORECASE)
# In the spelling of class names: "GptOssModel" holds no state.
_STATE = re.compile(r"Mamba|R[Ww][Kk][Vv]|L(STM|stm)|Recurrent|DeltaNet|Retention|SSM|ShortConv")
_RELATIVE = re.compile(r"(^|\.)(position_bias|relative_attention_bias)$")


def structural_reasons(config: Any) -> list[str]:
    """Return what of a model's modules a ring of keys cannot serve.

    Args:
        config: the model's; it is built on the meta device as transformers builds it.

    Returns:
        Texts as `kinds.refusal` takes them; empty where nothing is found or nothing can be built.
    """
    try:
        with torch.device("meta"):
            model = new_model(config)
    except CODE_ERRORS:
        return []  # building it with our attention says why
    return list(_reasons(model))


def _reasons(model: nn.Module) -> Iterator[str]:
    modules = dict(model.named_modules())
    states = [m for m in modules.values() if _STATE.search(type(m).__name__)]
    if states:
        yield (
            f"recurrent: its {type(states[0]).__name__} keeps a recurrent or convolutional state, "
            f"which the exported caches do not carry"
        )
    elif any(isinstance(module, nn.Conv1d) for module in modules.values()):
        yield (
            "convolution over tokens: it keeps the last inputs of a convolution, a state that the "
            "exported caches do not carry"
        )
    for name, module in modules.items():
        if "rotary" in f"{name} {type(module).__name__}".lower():
            continue
        if _POSITION_NAME.search(name) and isinstance(module, nn.Embedding):
            count = module.num_embeddings
            yield (
                f"learned absolute positions: its table {name.rpartition('.')[2]} has {count} of "
                f"them, and beyond there is none to give a token"
            )
            return
        if _SINUSOIDAL.search(type(module).__name__) or (
            _POSITION_NAME.search(name) and not list(module.children())
        ):
            yield (
                "absolute positions: each token's own is added to its embedding, so keys in a "
                "ring cannot be moved to another distance"
            )
            return
        if _RELATIVE.search(name):
            yield (
                "relative position bias: learned for each distance; only rotary embeddings and "
                "ALiBi are computed"
            )
            return
