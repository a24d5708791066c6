"""Frequencies, pairing and scaling of a model's rotary embeddings, computed by its own classes.

A scaling that changes with the length of the text has no length to go by in a stream; it is frozen
in its short or its long regime when the model is exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ConfigError, ModelError
from lminf_export.models.base import Rotation, Turn
from lminf_export.models.internals import Internals
from lminf_export.models.own_rotation import apply_of, own_rotation
from lminf_export.models.pairing import find_pairing
from lminf_export.models.remote_code import is_own_class
from lminf_export.operator.settings import LambdaConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
# Scalings that change with the length of the text; one regime is frozen at export.
LENGTH_DEPENDENT = ("dynamic", "longrope")
_INTERNALS = Internals("models with rotary embeddings")


def read_rotation(model: nn.Module, config: Any, turn: Turn, regime: str | None) -> Rotation:
    """Compute a rotation's frequencies and pairing on the CPU, by the model's own rotary class."""
    cls: Any = type(model.get_submodule(turn.module))
    rope = rope_parameters(config, turn.layer_type)[0]
    is_long = regime == "long" and rope.get("rope_type") in LENGTH_DEPENDENT
    if is_own_class(cls):
        if is_long:
            raise ModelError(
                f"the repository's own {cls.__name__} has no long regime that is known; leave out "
                f"--rope-regime, or use a window within the training length"
            )
        return own_rotation(model, config, turn.module)
    module = cls(config)
    prefix = f"{turn.layer_type}_" if turn.layer_type else ""
    names = (f"{prefix}inv_freq", f"{prefix}attention_scaling")
    frequencies, scaling = _INTERNALS.members(module, *names)
    inv_freq, factor = frequencies.float(), float(scaling)
    # Phi-3.5-MoE: a factor for each regime, beside frequencies that do not change with it.
    own_factor = rope.get(f"{regime}_mscale")
    if own_factor is not None:
        factor = float(rope["short_mscale"])
    apply = apply_of(model)
    extra = (turn.layer_type,) if turn.layer_type else ()
    pairing = find_pairing(
        lambda x, position: apply(x, x, *module(x, position, *extra))[0], inv_freq, factor
    )
    if own_factor is not None:
        factor = float(own_factor)
    elif is_long:
        inv_freq, factor = _long_regime(config, rope, turn.layer_type)
    return Rotation(pairing.sign * inv_freq, factor, pairing.interleaved)


def _long_regime(config: Any, rope: Any, layer_type: str | None) -> tuple[Tensor, float]:
    """Return frequencies and attention factor as transformers has them for long texts."""
    functions = _INTERNALS.lookup("modeling_rope_utils.ROPE_INIT_FUNCTIONS")
    kind = rope["rope_type"]
    length = (
        int(config.max_position_embeddings * rope["factor"])
        if kind == "dynamic"
        else int(rope["original_max_position_embeddings"]) + 1
    )
    inv_freq, factor = functions[kind](
        config, torch.device("cpu"), seq_len=length, layer_type=layer_type
    )
    return inv_freq.float(), float(factor)


def choose_regime(
    config: Any, settings: LambdaConfig, scalings: list[dict[str, Any]]
) -> tuple[str | None, tuple[str, ...]]:
    """Choose the regime in which a length-dependent rotary scaling is frozen.

    A query sees no distance beyond the window. So "short" is the default where the window lies
    within the length of the short regime.

    Returns:
        "short", "long" or None for a model without such a scaling; notices for the user.

    Raises:
        ConfigError: `rope_regime` is set for a model without such a scaling.
    """
    if not scalings:
        if settings.rope_regime is None:
            return None, ()
        raise ConfigError(
            f"rope_regime={settings.rope_regime}: the rotary embedding of this "
            f"{config.model_type} model does not depend on the length of the text; leave it out"
        )
    kind = scalings[0]["rope_type"]
    longest = config.max_position_embeddings
    border = scalings[0]["original_max_position_embeddings"] if kind == "longrope" else longest
    regime = settings.rope_regime or ("short" if settings.window_size <= border else "long")
    equal = (
        f"equal to the unmodified model for texts of up to {min(border, settings.window_size)} "
        f"tokens"
        if regime == "short"
        else f"which the unmodified model uses for texts longer than {border} tokens only"
    )
    notice = (
        f"rotary scaling {kind!r} changes with the length of a text, a stream has none: it is "
        f"frozen in its {regime} regime, {equal}; --rope-regime sets it"
    )
    return regime, (notice,)


def rope_parameters(config: Any, layer_type: str | None = None) -> list[dict[str, Any]]:
    """Return the rotary parameters: one set, or one for each layer type (or one type's)."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if layer_type in nested:
        return [nested[layer_type]]
    return list(nested.values()) or [rope]


def check_rope_types(config: Any) -> None:
    """Raise ModelError for a rotary scaling that is not supported."""
    for rope in rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"rotary scaling {kind!r} of this {config.model_type} model is not supported; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )
