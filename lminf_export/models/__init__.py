"""Model families: which there are, and how each is opened for Λ-attention."""

from __future__ import annotations

from lminf_export.errors import ModelError
from lminf_export.models.base import Family
from lminf_export.models.rotary import RotaryFamily

_FAMILIES: tuple[Family, ...] = (RotaryFamily("llama"),)
FAMILIES: dict[str, Family] = {
    model_type: family for family in _FAMILIES for model_type in family.model_types
}

# Why these can never be served, for a better message than "unknown".
LEARNED_POSITIONS = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "opt", "xglm", "biogpt", "ctrl"})


def find_family(model_type: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
        ModelError: the type is not supported; the message says which are.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if model_type in LEARNED_POSITIONS:
        raise ModelError(
            f"model type {model_type!r} has learned absolute positions: beyond its training "
            f"length there is no position to give a token; Λ-attention needs relative "
            f"positions (supported: {known})"
        )
    raise ModelError(f"model type {model_type!r} is not supported; supported are: {known}")
