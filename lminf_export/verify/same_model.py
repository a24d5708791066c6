"""Whether a model can be the one that a bundle was exported from, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.checkpoint.source import Source, open_source
from lminf_export.errors import InputError, shortened
from lminf_export.models.remote_code import may_run_code
from lminf_export.tensors.files import find_weights

# Facts that shape a model's tensors, as transformers' configurations name them.
_STRUCTURE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "layer_types",
)


def check_same_model(bundle: Bundle, source: Source) -> None:
    """Refuse to compare a bundle with another model.

    Args:
        bundle: opened; it holds the configuration it was exported with.
        source: the model to compare it with.

    Raises:
        InputError: naming what differs: the model type, or a size.
    """
    different = next(_differences(bundle, source), None)
    if different is None:
        return
    name, found, expected = different
    origin = shortened(repr(bundle.manifest.source.name), 50)
    raise InputError(
        f"model {shortened(repr(source.name), 50)} is not the one bundle "
        f"{shortened(repr(bundle.path.name), 40)} was exported from: its {name} is "
        f"{shortened(str(found), 30)}, the bundle's {shortened(str(expected), 30)}; give {origin} "
        f"as --model, or leave it out"
    )


def check_weights_fit(original: Checkpoint) -> None:
    """Refuse a checkpoint that lacks weights: transformers would put random ones in their place.

    Raises:
        ModelError: a weight is missing, or of another shape than its configuration asks for.
    """
    skeleton = original.skeleton
    own = skeleton.conversion.apply(original.tensors)
    find_weights(own, {group[0]: group for group in skeleton.groups}, skeleton.shapes)


def _differences(bundle: Bundle, source: Source) -> Iterator[tuple[str, Any, Any]]:
    if source.model_type != bundle.manifest.model_type:
        yield "model_type", source.model_type, bundle.manifest.model_type
        return
    own = open_source(bundle.path, trust_remote_code=may_run_code(source.config)).config
    for name in _STRUCTURE:
        found, expected = (getattr(config, name, None) for config in (source.config, own))
        if found != expected:
            yield name, found, expected
