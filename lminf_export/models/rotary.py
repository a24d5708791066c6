"""All families with rotary embeddings that use transformers' attention interface.

No fact about a single family is written here. One step on the meta device, with rotation and
masks intercepted (`interception.py`), shows for each layer its rotation or that it has none, its
window, the soft cap of its logits and its learned sink logits. The plan follows from these calls.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ModelError
from lminf_export.models.base import (
    AnyWeights,
    AttentionCall,
    AttentionPlan,
    GetModel,
    Rotation,
    Visible,
    build_model,
    model_errors,
    use_step,
)
from lminf_export.models.interception import intercepted
from lminf_export.models.rope_scaling import (
    LENGTH_DEPENDENT,
    check_rope_types,
    choose_regime,
    read_rotation,
    rope_parameters,
)
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.settings import DEFAULT_LAMBDA_LAYERS, LambdaConfig, ring_capacity


class RotaryFamily(AnyWeights):
    """Adapter of all models with rotary embeddings behind the attention interface."""

    def training_length(self, config: Any) -> int | None:
        """Return the length before any rotary extension."""
        for rope in rope_parameters(config):
            if rope.get("original_max_position_embeddings"):
                return int(rope["original_max_position_embeddings"])
        return getattr(config, "max_position_embeddings", None)

    def plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Observe how each layer attends, and apply the Λ settings to it.

        Raises:
            ModelError: the model's code cannot be run with this configuration.
        """
        with model_errors(config):
            return self.observed_plan(config, settings, model)

    def observed_plan(
        self, config: Any, settings: LambdaConfig, model: GetModel | None = None
    ) -> AttentionPlan:
        """Plan as `plan` does; errors of the model's own code are raised as they are."""
        check_rope_types(config)
        regime, regime_notices = self._regime(config, settings)
        observed = model() if model else build_model(config, torch.float32, device="meta")
        calls = [_without_idle_window(call, config) for call in self.observe(observed, config)]
        if any(call.key.shape[-1] != call.value.shape[-1] for call in calls):
            raise ModelError("keys and values of different sizes are not supported")
        turns = sorted({call.turn for call in calls if call.turn is not None}, key=str)
        found = [read_rotation(observed, config, turn, regime) for turn in turns]
        rotations, places = distinct(found)
        if rotations and any(call.turn is None for call in calls):
            # A layer without rotation turns by angle zero: one operator body for all layers.
            rotations.append(Rotation(torch.zeros_like(rotations[0].inv_freq)))
        unrotated = len(rotations) - 1 if rotations else None
        softcaps = {call.softcap for call in calls}
        if len(softcaps) > 1:
            raise ModelError(f"its layers cap their logits differently: {sorted(softcaps)}")
        return AttentionPlan(
            layers=tuple(_layer(call, settings) for call in calls),
            num_attention_heads=calls[0].query.shape[1],
            rotations=tuple(rotations),
            layer_rotation=tuple(
                places[turns.index(call.turn)] if call.turn is not None else unrotated
                for call in calls
            ),
            softcap=softcaps.pop(),
            sink_logits=calls[0].sink_logits is not None,
            sliding=tuple(call.visible.window is not None for call in calls),
            notices=(*regime_notices, *_notices(calls, settings)),
        )

    def is_length_dependent(self, rope: dict[str, Any]) -> bool:
        """Say whether a rotary scaling changes with the length of the text."""
        return rope.get("rope_type") in LENGTH_DEPENDENT

    def _regime(self, config: Any, settings: LambdaConfig) -> tuple[str | None, tuple[str, ...]]:
        scalings = [rope for rope in rope_parameters(config) if self.is_length_dependent(rope)]
        return choose_regime(config, settings, scalings)

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        """See `Family.patched`."""
        return intercepted(model)

    def observe(self, model: nn.Module, config: Any) -> list[AttentionCall]:
        """Run one step on the meta device and return every layer's attention call, in order."""
        step = _Observer()
        tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        with self.patched(model), use_step(step), torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        return in_layer_order(step.calls, config)


def in_layer_order(calls: dict[int, AttentionCall], config: Any) -> list[AttentionCall]:
    """Return one step's attention calls, one for each layer.

    Raises:
        ModelError: a layer has none.
    """
    if not calls:
        raise ModelError(
            "attention of its own: no layer attends through transformers' attention interface or "
            "by a softmax of queries times keys behind apply_rotary_pos_emb, so there is nothing "
            "Λ-attention could take the place of"
        )
    if len(calls) != config.num_hidden_layers:
        raise ModelError(
            f"recurrent hybrid: only {len(calls)} of its {config.num_hidden_layers} layers attend "
            f"to keys; the others keep another state, which the exported caches do not carry"
        )
    return [calls[layer] for layer in sorted(calls)]


def keep_call(calls: dict[int, AttentionCall], call: AttentionCall) -> None:
    """Add a layer's attention call to those of a step.

    Raises:
        ModelError: the layer has called before.
    """
    if call.layer in calls:
        raise ModelError(
            f"repeated attention: layer {call.layer} attends twice in one step; with one cache a "
            f"layer the second would read the keys of the first"
        )
    calls[call.layer] = call


class _Observer:
    """Answers attention with an empty tensor and keeps the calls."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        keep_call(self.calls, call)
        return call.query.new_empty(*call.query.shape[:-1], call.value.shape[-1])


def _without_idle_window(call: AttentionCall, config: Any) -> AttentionCall:
    """Drop a window at least as long as the model's longest text: it never hides a key."""
    window = call.visible.window
    longest = getattr(config, "max_position_embeddings", None)
    if window is None or longest is None or window < longest:
        return call
    return replace(call, visible=Visible())


def _layer(call: AttentionCall, settings: LambdaConfig) -> LayerSpec:
    """Apply the Λ settings to a layer without a window; a sliding layer keeps its own window."""
    window = call.visible.window
    own = window is not None
    size = window if window is not None else settings.window_size
    has_sinks = not own or settings.lambda_layers == "all"
    return LayerSpec(
        num_kv_heads=call.key.shape[1],
        head_dim=call.query.shape[-1],
        window_size=size,
        num_sink_tokens=settings.num_sink_tokens if has_sinks else 0,
        distance_limit=size if own else settings.distance_limit,
        ring_capacity=ring_capacity(size, settings.chunk_size),
    )


def distinct(rotations: list[Rotation]) -> tuple[list[Rotation], list[int]]:
    """Return each different rotation once, and for every given one its place among them.

    A model with a rotary module in each layer asks for the same one again and again.
    """
    kept: list[Rotation] = []
    places = []
    for rotation in rotations:
        equal = (index for index, other in enumerate(kept) if rotation.equals(other))
        place = next(equal, len(kept))
        if place == len(kept):
            kept.append(rotation)
        places.append(place)
    return kept, places


def _notices(calls: list[AttentionCall], settings: LambdaConfig) -> tuple[str, ...]:
    slides_everywhere = all(call.visible.window is not None for call in calls)
    if settings.lambda_layers == DEFAULT_LAMBDA_LAYERS and slides_everywhere:
        return (
            "every layer of this model was trained with a sliding window and keeps it; "
            "no layer is left for sink tokens; --lambda-layers all gives them sinks too",
        )
    return ()
