"""Kinds of model types by transformers' own tables, and the errors that its code raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lminf_export.errors import DependencyError
from lminf_export.models.internals import Internals

_INTERNALS = Internals("messages about models")

# What code of a model raises on a configuration or on inputs that it was not written for.
CODE_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, TypeError, ValueError, StrictDataclassError),
)


def is_known(model_type: str) -> bool:
    """Whether this version of transformers has a configuration of the type."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def is_causal_lm(model_type: str) -> bool | None:
    """Whether transformers writes text with it; None for a type that it does not know."""
    if not is_known(model_type):
        return None
    names = _names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    return model_type in names if names else None


def causal_lm_name(model_type: str) -> str:
    """Return the name of the class that writes text with a type; the type has one."""
    names = _INTERNALS.lookup("models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    name: str = names[model_type]
    return name


def is_masked_lm(model_type: str) -> bool:
    """Whether transformers fills gaps with it, which takes attention to later tokens."""
    return model_type in _names("MODEL_FOR_MASKED_LM_MAPPING_NAMES")


def is_encoder_decoder(model_type: str) -> bool:
    """Whether transformers has it as an encoder with a decoder only."""
    if is_causal_lm(model_type):
        return False
    return model_type in _names("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")


def wrapper_class_name(model_type: str) -> str | None:
    """Return transformers' class that reads more than text with a type and writes text, if any."""
    for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM"):
        found = _names(f"MODEL_FOR_{task}_MAPPING_NAMES").get(model_type)
        if found is not None:
            return found if isinstance(found, str) else str(found[0])
    return None


def _names(table: str) -> Mapping[str, Any]:
    """Return the model types of a table; none where a release renamed it, as it serves messages."""
    try:
        found: Mapping[str, Any] = _INTERNALS.lookup(f"models.auto.modeling_auto.{table}")
    except DependencyError:
        return {}
    return found
