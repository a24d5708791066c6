"""Every family that attends through transformers' attention interface, seen rather than listed.

Nothing here is written down per family. While the model is patched, its rotary module returns a
tag instead of cosines, `apply_rotary_pos_emb` returns queries and keys as they are and remembers
the tag, and the mask functions return what they would have masked. So each attention call says by
itself how it rotates (or that it does not), how far it looks, whether it caps its logits and
whether it has learned sink logits. One step over the meta device, and the plan is known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export import reference
from lminf_export.bindings import LayerSpec
from lminf_export.config import LambdaConfig, ring_capacity
from lminf_export.errors import ModelError
from lminf_export.models.base import (
    AttentionCall,
    AttentionPlan,
    Rotation,
    Turn,
    Visible,
    announce_turn,
    build_model,
    replaced,
    use_step,
)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class RotaryFamily:
    """Adapter of all models with rotary embeddings behind the attention interface.

    Args:
        model_types: transformers' names that have been tested.
    """

    def __init__(self, *model_types: str) -> None:
        self.model_types: tuple[str, ...] = model_types

    def training_length(self, config: Any) -> int | None:
        """Return the length before any rotary extension."""
        for rope in _rope_parameters(config):
            if rope.get("original_max_position_embeddings"):
                return int(rope["original_max_position_embeddings"])
        return getattr(config, "max_position_embeddings", None)

    def plan(self, config: Any, settings: LambdaConfig) -> AttentionPlan:
        """Let the model show how each layer attends, and apply the Λ settings to it."""
        _check_rope_types(config)
        model = build_model(config, torch.float32, device="meta")
        calls = self._observe(model, config)
        if any(call.key.shape[-1] != call.value.shape[-1] for call in calls):
            raise ModelError("keys and values of different sizes are not supported")
        turns = sorted({call.turn for call in calls if call.turn is not None}, key=str)
        rotations = [_rotation(model, config, turn) for turn in turns]
        if rotations and any(call.turn is None for call in calls):
            # A layer without rotation turns by angle zero: one operator body for all layers.
            rotations.append(Rotation(torch.zeros_like(rotations[0].inv_freq)))
        unrotated = len(rotations) - 1 if rotations else None
        softcaps = {call.softcap for call in calls}
        assert len(softcaps) == 1, f"layers with different soft caps: {softcaps}"
        return AttentionPlan(
            layers=tuple(_layer(call, settings) for call in calls),
            num_attention_heads=calls[0].query.shape[1],
            rotations=tuple(rotations),
            layer_rotation=tuple(
                turns.index(call.turn) if call.turn is not None else unrotated for call in calls
            ),
            softcap=softcaps.pop(),
            sink_logits=calls[0].sink_logits is not None,
            sliding=tuple(call.visible.window is not None for call in calls),
            notices=_notices(calls),
        )

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take rotation and masks out of the model's own code."""
        code = sys.modules[type(model).__module__]
        with ExitStack() as stack:
            stack.enter_context(replaced(code, "apply_rotary_pos_emb", _remember_turn))
            for name, mask in _MASKS.items():
                if hasattr(code, name):
                    stack.enter_context(replaced(code, name, mask))
            for path in _rotary_modules(model):
                parent, _, name = path.rpartition(".")
                owner = model.get_submodule(parent)
                stack.enter_context(replaced(owner, name, _TurnSource(path)))
            yield

    def _observe(self, model: nn.Module, config: Any) -> list[AttentionCall]:
        """Run one step on the meta device and return every layer's attention call, in order."""
        step = _Observer()
        tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        with self.patched(model), use_step(step), torch.no_grad():
            model(input_ids=tokens, use_cache=False)
        calls = [step.calls[layer] for layer in sorted(step.calls)]
        if len(calls) != config.num_hidden_layers:
            raise ModelError(
                f"{len(calls)} of {config.num_hidden_layers} layers of this {config.model_type} "
                f"model attend to keys; the others keep a state of another kind, which Λ-attention "
                f"cannot bound"
            )
        return calls


class _Observer:
    """Answers attention with nothing and remembers who asked for what."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        if call.layer in self.calls:
            raise ModelError(
                f"layer {call.layer} attends twice in one step; with one cache a layer the second "
                f"attention would read the keys of the first"
            )
        self.calls[call.layer] = call
        return torch.empty_like(call.query)


class _TurnSource(nn.Module):
    """Takes the place of a rotary module: returns which rotation it would have been, twice."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self, x: Tensor, position_ids: Tensor | None = None, layer_type: str | None = None
    ) -> tuple[Turn, Turn]:
        turn = Turn(self.path, layer_type)
        return turn, turn


def _remember_turn(
    query: Tensor, key: Tensor, cos: Turn, sin: Turn, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Take the place of `apply_rotary_pos_emb`."""
    announce_turn(cos)
    return query, key


def _causal(*_: Any, **__: Any) -> Visible:
    return Visible()


def _sliding(config: Any, *_: Any, **__: Any) -> Visible:
    return Visible(int(config.sliding_window))


def _chunked(*_: Any, **__: Any) -> Visible:
    raise ModelError(
        "this model masks in chunks of absolute positions; a window that slides cannot follow it"
    )


_MASKS = {
    "create_causal_mask": _causal,
    "create_sliding_window_causal_mask": _sliding,
    "create_chunked_causal_mask": _chunked,
}


def _rotary_modules(model: nn.Module) -> list[str]:
    """Return the paths of a model's rotary embeddings."""
    return [
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    ]


def _layer(call: AttentionCall, settings: LambdaConfig) -> LayerSpec:
    """Apply Λ to a layer that sees everything; leave a sliding layer its own window."""
    window = call.visible.window
    own = window is not None
    size = window if window is not None else settings.window_size
    return LayerSpec(
        num_kv_heads=call.key.shape[1],
        head_dim=call.query.shape[-1],
        window_size=size,
        num_sink_tokens=0 if own else settings.num_sink_tokens,
        distance_limit=size if own else settings.distance_limit,
        ring_capacity=ring_capacity(size, settings.chunk_size),
    )


def _rotation(model: nn.Module, config: Any, turn: Turn) -> Rotation:
    """Compute a rotation's frequencies on the CPU by the model's own class, and its pairing."""
    module: Any = type(model.get_submodule(turn.module))(config)
    prefix = f"{turn.layer_type}_" if turn.layer_type else ""
    inv_freq = getattr(module, f"{prefix}inv_freq").float()
    factor = float(getattr(module, f"{prefix}attention_scaling"))
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    return Rotation(inv_freq, factor, _is_interleaved(module, apply, turn, inv_freq, factor))


def _is_interleaved(
    module: nn.Module, apply: Any, turn: Turn, inv_freq: Tensor, factor: float
) -> bool:
    """Recognise the pairing by rotating known vectors with the model's own function."""
    position = torch.tensor([[1, 2, 3]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 3, 2 * inv_freq.numel(), generator=generator)
    extra = (turn.layer_type,) if turn.layer_type else ()
    rotated, _ = apply(x, x, *module(x, position, *extra))
    angle = position[:, None, :, None] * inv_freq
    for interleaved in (False, True):
        wanted = reference.rotate(
            x, angle.cos() * factor, angle.sin() * factor, interleaved=interleaved
        )
        if torch.allclose(rotated, wanted, atol=1e-4):
            return interleaved
    raise ModelError(
        "the rotary embedding of this model pairs its dimensions in a way that is not recognised "
        "(neither half-split nor interleaved); its keys could not be re-positioned"
    )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters: one set, or one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _check_rope_types(config: Any) -> None:
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"rotary scaling {kind!r} of this {config.model_type} model is not supported; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )


def _notices(calls: list[AttentionCall]) -> tuple[str, ...]:
    if all(call.visible.window is not None for call in calls):
        return (
            "every layer of this model was trained with a sliding window and keeps it; "
            "no layer is left for sink tokens",
        )
    return ()
