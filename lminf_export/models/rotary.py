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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.errors import ConfigError, ModelError
from lminf_export.models.base import (
    AnyWeights,
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
from lminf_export.operator import reference
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.settings import LambdaConfig, ring_capacity

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
# Scalings that change with the length of the text; one regime is frozen at export.
LENGTH_DEPENDENT = ("dynamic", "longrope")


class RotaryFamily(AnyWeights):
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
        regime, regime_notices = self._regime(config, settings)
        model = build_model(config, torch.float32, device="meta")
        calls = [_without_idle_window(call, config) for call in self.observe(model, config)]
        if any(call.key.shape[-1] != call.value.shape[-1] for call in calls):
            raise ModelError("keys and values of different sizes are not supported")
        turns = sorted({call.turn for call in calls if call.turn is not None}, key=str)
        rotations = [_rotation(model, config, turn, regime) for turn in turns]
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
                turns.index(call.turn) if call.turn is not None else unrotated for call in calls
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
        scalings = [rope for rope in _rope_parameters(config) if self.is_length_dependent(rope)]
        return _regime(config, settings, scalings)

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Take rotation and masks out of the model's own code."""
        code = sys.modules[type(model).__module__]
        rotary = _rotary_modules(model)
        with ExitStack() as stack:
            if hasattr(code, "apply_rotary_pos_emb"):
                stack.enter_context(replaced(code, "apply_rotary_pos_emb", _remember_turn))
            elif rotary:
                raise ModelError(
                    f"{type(model).__name__} rotates by code of its own, not by "
                    f"apply_rotary_pos_emb; the rotation cannot be taken out of it"
                )
            for name, mask in _MASKS.items():
                if hasattr(code, name):
                    stack.enter_context(replaced(code, name, mask))
            for module in model.modules():
                stack.enter_context(_known_embed_scale(module))
            for path in rotary:
                parent, _, name = path.rpartition(".")
                owner = model.get_submodule(parent)
                stack.enter_context(
                    replaced(owner, name, _TurnSource(path, model.get_submodule(path)))
                )
            yield

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
            "no layer attends through transformers' attention interface; there is nothing "
            "Λ-attention could take the place of"
        )
    if len(calls) != config.num_hidden_layers:
        raise ModelError(
            f"only {len(calls)} of its {config.num_hidden_layers} layers attend to keys; the "
            f"others keep a state of another kind, as recurrent or convolutional layers do, "
            f"which the exported caches do not carry"
        )
    return [calls[layer] for layer in sorted(calls)]


def keep_call(calls: dict[int, AttentionCall], call: AttentionCall) -> None:
    """Add a layer's attention call to those of a step.

    Raises:
        ModelError: the layer has called before.
    """
    if call.layer in calls:
        raise ModelError(
            f"layer {call.layer} attends twice in one step; with one cache a layer the second "
            f"attention would read the keys of the first"
        )
    calls[call.layer] = call


class _Observer:
    """Answers attention with nothing and remembers who asked for what."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        keep_call(self.calls, call)
        return torch.empty_like(call.query)


class _TurnSource(nn.Module):
    """Takes the place of a rotary module: returns which rotation it would have been, twice."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        self._replaced = (module,)  # in a tuple: not a submodule, or its buffers would be ours

    def __getattr__(self, name: str) -> Any:
        """Some models ask their rotary module what it was configured with."""
        return getattr(self.__dict__["_replaced"][0], name)

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


class _Factor(float):
    """A number where the model expects a tensor without dimensions."""

    def to(self, dtype: torch.dtype) -> float:
        return torch.tensor(float(self), dtype=dtype, device="cpu").item()


@contextmanager
def _known_embed_scale(module: nn.Module) -> Iterator[None]:
    """Give scaled embeddings their factor: the buffer that holds it is empty on the meta device."""
    scale = module._buffers.get("embed_scale")
    if scale is None or not scale.is_meta:
        yield
        return
    del module._buffers["embed_scale"]
    module.__dict__["embed_scale"] = _Factor(module.scalar_embed_scale)  # type: ignore[arg-type]  # a float
    try:
        yield
    finally:
        del module.__dict__["embed_scale"]
        module._buffers["embed_scale"] = scale


def _without_idle_window(call: AttentionCall, config: Any) -> AttentionCall:
    """Take a window that no text of the trained lengths ever fills for what it is: none."""
    window = call.visible.window
    longest = getattr(config, "max_position_embeddings", None)
    if window is None or longest is None or window < longest:
        return call
    return replace(call, visible=Visible())


def _layer(call: AttentionCall, settings: LambdaConfig) -> LayerSpec:
    """Apply Λ to a layer that sees everything; leave a sliding layer its own window."""
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


def _rotation(model: nn.Module, config: Any, turn: Turn, regime: str | None) -> Rotation:
    """Compute a rotation's frequencies on the CPU by the model's own class, and its pairing."""
    module: Any = type(model.get_submodule(turn.module))(config)
    prefix = f"{turn.layer_type}_" if turn.layer_type else ""
    inv_freq = getattr(module, f"{prefix}inv_freq").float()
    factor = float(getattr(module, f"{prefix}attention_scaling"))
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    interleaved = _is_interleaved(module, apply, turn, inv_freq, factor)
    rope = _rope_parameters(config, turn.layer_type)[0]
    if regime == "long" and rope.get("rope_type") in LENGTH_DEPENDENT:
        inv_freq, factor = _long_regime(config, rope, turn.layer_type)
    return Rotation(inv_freq, factor, interleaved)


def _long_regime(config: Any, rope: Any, layer_type: str | None) -> tuple[Tensor, float]:
    """Return frequencies and attention factor as transformers has them for long texts."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope["rope_type"]
    length = (
        int(config.max_position_embeddings * rope["factor"])
        if kind == "dynamic"
        else int(rope["original_max_position_embeddings"]) + 1
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](
        config, torch.device("cpu"), seq_len=length, layer_type=layer_type
    )
    return inv_freq.float(), float(factor)


def _regime(
    config: Any, settings: LambdaConfig, scalings: list[dict[str, Any]]
) -> tuple[str | None, tuple[str, ...]]:
    """Choose what a length-dependent rotary scaling is frozen to, and say so.

    Short distances are all a query ever sees while the window is within the short regime's
    length, so that is the default there.
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


def _rope_parameters(config: Any, layer_type: str | None = None) -> list[dict[str, Any]]:
    """Return the rotary parameters: one set, or one for each layer type (or one type's)."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if layer_type in nested:
        return [nested[layer_type]]
    return list(nested.values()) or [rope]


def _check_rope_types(config: Any) -> None:
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"rotary scaling {kind!r} of this {config.model_type} model is not supported; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )


def _notices(calls: list[AttentionCall], settings: LambdaConfig) -> tuple[str, ...]:
    if settings.lambda_layers == "full" and all(call.visible.window is not None for call in calls):
        return (
            "every layer of this model was trained with a sliding window and keeps it; "
            "no layer is left for sink tokens; --lambda-layers all gives them sinks too",
        )
    return ()
