"""A bundle's model in torch: what everything that needs a second computation starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lminf_export.bundle import Bundle
from lminf_export.errors import BundleError
from lminf_export.models.base import AttentionPlan, Family, build_model, register_attention
from lminf_export.quantize.dequantize import dequantized_folder
from lminf_export.source import Source, open_source


def bundle_plan(bundle: Bundle, family: Family, source: Source) -> AttentionPlan:
    """Return how a source's layers attend under a bundle's settings.

    Raises:
        BundleError: the source is not the model the bundle was exported from.
    """
    manifest = bundle.manifest
    plan = family.plan(source.config, manifest.settings)
    for what, found, expected in (
        ("model type", source.model_type, manifest.model_type),
        ("vocabulary", source.config.vocab_size, manifest.vocab_size),
        ("query heads", plan.num_attention_heads, manifest.num_attention_heads),
        ("layers", plan.layers, manifest.layer_specs),
    ):
        if found != expected:
            detail = "" if what == "layers" else f" ({found}, not {expected})"
            raise BundleError(
                f"{source.name!r} has other {what} than bundle {bundle.path.name!r}{detail}; "
                f"compare with the model it was exported from"
            )
    return plan


@contextmanager
def reference_source(bundle: Bundle, original: Source) -> Iterator[Source]:
    """Yield the model whose logits are right: for a quantised bundle, of dequantised weights."""
    if bundle.manifest.quantization is None:
        yield original
        return
    skeleton = build_model(original.config, torch.float32, device="meta")
    with dequantized_folder(bundle, skeleton) as folder:
        yield open_source(folder)


def load_torch_model(source: Source, dtype: torch.dtype, attention: str | None) -> Any:
    """Load a model; without an attention of ours, with what transformers takes by itself."""
    from transformers import AutoModelForCausalLM

    register_attention()
    return AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation="eager",  # the only one that takes float64, and the plainest
        use_safetensors=True,
    ).eval()
