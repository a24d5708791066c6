"""Model types that transformers does not know and that are other names of a tested one.

That is taken for granted only where it is sure: earlier releases of transformers had the type with
the classes of another, or the configuration names the class of a tested type as the one that its
tensors were saved from, and brings no code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lminf_export.errors import shortened
from lminf_export.models.registry import FAMILIES
from lminf_export.models.transformers_tables import causal_lm_name, is_causal_lm, is_known

# Types of earlier releases of transformers, which had the classes of another type.
_FORMER: Mapping[str, str] = {"code_llama": "llama"}
# Classes by the names that they had when they were new.
_FORMER_CLASSES: Mapping[str, str] = {"LLaMAForCausalLM": "LlamaForCausalLM"}


def alias_of(content: Mapping[str, Any]) -> str | None:
    """Return the type that a config.json of a type unknown to transformers is another name of.

    Args:
        content: of config.json.

    Returns:
        A tested type, or None.
    """
    kind = content["model_type"]
    if is_known(kind) or content.get("auto_map"):
        return None
    if kind in _FORMER:
        return _FORMER[kind]
    names = content.get("architectures")
    named = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(named, str):
        return None
    return _types_by_class().get(_FORMER_CLASSES.get(named, named))


def alias_notice(kind: str, read_as: str) -> str:
    """Return what the user should know of a model that is read as one of another type."""
    why = (
        "earlier releases had the same classes for both"
        if kind in _FORMER
        else f"config.json names the class {causal_lm_name(read_as)} and brings no code"
    )
    return (
        f"model type {shortened(repr(kind), 40)} is unknown to transformers and read as "
        f"{read_as!r}: {why}"
    )


def _types_by_class() -> dict[str, str]:
    """Return class → tested type."""
    return {causal_lm_name(kind): kind for kind in sorted(FAMILIES) if is_causal_lm(kind)}
