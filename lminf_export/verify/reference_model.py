"""A bundle's model in torch: the second computation that bundles are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.checkpoint.stock import stock_model
from lminf_export.checkpoint.streamed import StreamedModel
from lminf_export.errors import BundleError
from lminf_export.models.base import ATTENTION_NAME, AttentionPlan, Family, use_step
from lminf_export.models.expert_facts import Groups, expert_groups
from lminf_export.models.history import HistoryStep
from lminf_export.models.rounded_rings import Int8Rings, Rings
from lminf_export.operator.contract import KEY_BIAS_OP_TYPE
from lminf_export.progress import Progress
from lminf_export.verify.bundle_weights import rounded_inputs
from lminf_export.verify.rounded_activations import rounded_activations
from lminf_export.verify.routing_check import Routed, experts_of

# Tokens that a layer of the reference computes together.
WIDTH = 256


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


class ReferenceLogits:
    """The logits of a stream, computed when they are asked for, from hidden states that are kept.

    Args:
        model: that computed the hidden states.
        hidden: (T, H).
        opened: returns the context in which the model runs.
    """

    def __init__(
        self,
        model: StreamedModel,
        hidden: torch.Tensor,
        opened: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._model, self._hidden, self._opened = model, hidden, opened

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self._hidden)

    def rows(self, start: int, stop: int) -> NDArray[np.floating[Any]]:
        """Return the logits (n, V) of the tokens start … stop − 1, in float64 or float32."""
        with self._opened():
            logits = self._model.logits(self._hidden[start:stop])
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.to(torch.float32)
        return logits.numpy()


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

    def logits(
        self,
        dtype: torch.dtype,
        routed: Routed | None = None,
        count: int | None = None,
        rounding: Bundle | None = None,
    ) -> ReferenceLogits:
        """Run the stream, or its first tokens, through the layers at a given precision.

        With a bundle given that lets onnxruntime round activations, so are they here.
        """
        model = StreamedModel.of(self.checkpoint, dtype, ATTENTION_NAME)
        tokens = torch.from_numpy(self.tokens[:count])
        name = f"reference in {str(dtype).removeprefix('torch.')}"
        walk = _StreamWalk(
            HistoryStep(self.plan, rounded=self.rounded), routed, len(tokens), self.progress, name
        )

        inputs = {} if rounding is None else rounded_inputs(rounding, self.checkpoint.skeleton)

        @contextmanager
        def opened() -> Iterator[None]:
            rounded = rounded_activations(model.model, inputs)
            with self.family.patched(model.model), rounded:
                yield

        if routed is not None:
            routed.begin()
        with opened(), use_step(walk.step), routed or nullcontext():
            hidden = model.hidden_states(tokens, walk)
        return ReferenceLogits(model, hidden, opened)

    def stock_logits(self, count: int, routed: Routed | None) -> ReferenceLogits:
        """Run the first tokens through the unmodified model, in float32."""
        self.progress("stock model", None)
        model = stock_model(self.checkpoint)
        if routed is not None:
            routed.begin()
        with routed or nullcontext():
            hidden = model.hidden_states(torch.from_numpy(self.tokens[:count]))
        return ReferenceLogits(model, hidden)

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


@dataclass
class _StreamWalk:
    """Leads a stream through the layers of a reference: see `checkpoint.streamed.Walk`.

    Attributes:
        step: answers attention.
        routed: the choice of experts, if there is any.
        num_tokens: T.
        progress: told of every block of tokens in every layer.
        name: of the phase.
    """

    step: HistoryStep
    routed: Routed | None
    num_tokens: int
    progress: Progress
    name: str
    width: int = WIDTH
    layer: int = -1

    def begin_layer(self) -> None:
        self.layer += 1
        self.step.restart()
        if self.routed is not None:
            self.routed.begin_layer()

    def begin_block(self, start: int, count: int) -> None:
        self.step.begin(torch.tensor([count]))
        if self.routed is not None:
            self.routed.begin_block(start)
        done = self.layer + start / self.num_tokens
        self.progress(self.name, done / len(self.step.plan.layers))

    def end_layer(self) -> None:
        self.step.restart()
