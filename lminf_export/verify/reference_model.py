"""A bundle's model in torch: the second computation that bundles are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint, load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.errors import BundleError
from lminf_export.models.base import ATTENTION_NAME, AttentionPlan, Family
from lminf_export.models.expert_facts import Groups, expert_groups
from lminf_export.models.history import HistoryStep
from lminf_export.models.rounded_rings import Int8Rings, Rings
from lminf_export.models.steps import run
from lminf_export.operator.contract import KEY_BIAS_OP_TYPE
from lminf_export.progress import Progress
from lminf_export.verify.bundle_weights import dequantized_folder, quantized_names
from lminf_export.verify.rounded_activations import rounded_activations
from lminf_export.verify.routing_check import Routed, experts_of


def bundle_plan(bundle: Bundle, family: Family, original: Checkpoint) -> AttentionPlan:
    """Return how a model's layers attend under a bundle's settings.

    Raises:
        BundleError: it is not the model the bundle was exported from.
    """
    manifest, source, skeleton = bundle.manifest, original.source, original.skeleton
    plan = family.plan(source.config, manifest.settings, lambda: skeleton.model)
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


def rounding_of(bundle: Bundle) -> Int8Rings | None:
    """Return how a bundle's rings round keys and values, None if they hold them as they are."""
    if not bundle.manifest.contract.int8_cache:
        return None
    graph = onnx.load(bundle.path / bundle.manifest.graph, load_external_data=False).graph
    # In a graph from before there was another way, biases are rounded with their keys.
    kept_out = any(node.op_type == KEY_BIAS_OP_TYPE for node in graph.node)
    return Int8Rings(keeps_bias=not kept_out)


@contextmanager
def reference_checkpoint(bundle: Bundle, original: Checkpoint) -> Iterator[Checkpoint]:
    """Yield the model that defines the right logits: for a quantised bundle, its own weights."""
    if bundle.manifest.quantization is None:
        yield original
        return
    with dequantized_folder(bundle, original.skeleton) as folder:
        source = open_source(folder)
        yield open_checkpoint(source, skeleton=original.skeleton.of(source.config))


@dataclass(frozen=True)
class Reference:
    """The model's own code with the written-out mathematics for its attention.

    Attributes:
        checkpoint: its configuration and tensors.
        family: how it is opened.
        plan: how its layers attend.
        tokens: (T,) the stream.
        progress: called with the phase and the fraction that is done.
        rounded: rounding of keys and values in the bundle's rings; None for exact rings.
    """

    checkpoint: Checkpoint
    family: Family
    plan: AttentionPlan
    tokens: NDArray[np.int64]
    progress: Progress
    rounded: Rings | None = None

    @torch.no_grad()
    def logits(
        self,
        dtype: torch.dtype,
        routed: Routed | None = None,
        count: int | None = None,
        rounding: Bundle | None = None,
    ) -> Any:
        """Logits (T, V) in float64 of the stream, or its first tokens, at a given precision.

        With a bundle given that lets onnxruntime round activations, so are they here.
        """
        name = f"reference in {str(dtype).removeprefix('torch.')}"
        self.progress(name, None)
        tokens = self.tokens[:count]
        model = load_model(self.checkpoint, dtype, ATTENTION_NAME)
        rounded: AbstractContextManager[None] = nullcontext()
        if rounding is not None and rounding.manifest.quantization is not None:
            block_size = rounding.manifest.quantization.block_size
            rounded = rounded_activations(model, quantized_names(rounding), block_size)
        step = HistoryStep(self.plan, rounded=self.rounded)
        width = min(256, len(tokens))
        logits = []
        with self.family.patched(model), rounded:
            for start in range(0, len(tokens), width):
                piece = torch.from_numpy(tokens[None, start : start + width])
                step.begin(torch.tensor([piece.shape[1]]))
                rows = torch.arange(piece.shape[1])[None]
                if routed is not None:
                    routed.begin(start)
                with routed or nullcontext():
                    logits.append(run(model, piece, step, rows)[0].to(torch.float64))
                self.progress(name, start / len(tokens))
        return torch.cat(logits).numpy()

    @torch.no_grad()
    def stock_logits(self, count: int, routed: Routed | None) -> Any:
        """Logits (T, V) float32 of the unmodified model for the first tokens."""
        self.progress("stock model", None)
        model = load_model(self.checkpoint, torch.float32, None)
        tokens = torch.from_numpy(self.tokens[None, :count])
        if routed is not None:
            routed.begin(0)
        with routed or nullcontext():
            return model(tokens, use_cache=False).logits[0].numpy()

    def routed(self, chosen: list[torch.Tensor] | None) -> Routed:
        """Return a mode in which the model's tokens meet the given experts."""
        sizes = experts_of(self.checkpoint.skeleton.model)
        assert sizes is not None
        return Routed(*sizes, chosen)

    def groups(self) -> Groups:
        """Return the groups of experts that the model's routers choose from first."""
        return expert_groups(self.checkpoint.source.config)

    def own_routing(self) -> Routed | None:
        """Return a mode that keeps the model's own choice of experts, if it has any."""
        sizes = experts_of(self.checkpoint.skeleton.model)
        return Routed(*sizes) if sizes else None
