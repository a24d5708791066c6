"""From what was measured of a foreign graph to how its layers attend over bounded caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lminf_export.errors import ConfigError, ModelError
from lminf_export.models.base import AttentionPlan, Rotation
from lminf_export.models.rotary import distinct
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.settings import LambdaConfig, ring_capacity
from lminf_export.rewriting.finding import Finding
from lminf_export.rewriting.measure import Measured
from lminf_export.rewriting.rules import round_base
from lminf_export.rewriting.turning import Turning

_SLOW = 1e-10  # radians per token
_FACTOR = 1e-3  # by which factors of rotated dimensions may differ


@dataclass(frozen=True)
class RewritePlan:
    """How a graph's layers attend once they are rewritten.

    Attributes:
        attention: as an export has it.
        scales: factor of the logits of each layer.
        sink_logits: (H,) learned logits of each layer, or None.
        exact_length: tokens of the longest text for which the result equals the original.
        is_of_long: whether a rotation is that of texts longer than `exact_length`, so that only the
            rest is equal.
    """

    attention: AttentionPlan
    scales: tuple[float, ...]
    sink_logits: tuple[Any, ...]
    exact_length: int
    is_of_long: bool


def plan_layers(
    layers: Sequence[Finding], settings: LambdaConfig, known: AttentionPlan | None
) -> RewritePlan:
    """Apply the Λ settings to what a graph's attentions compute.

    Args:
        layers: of the graph.
        settings: of Λ-attention.
        known: how the layers attend by the model's configuration, where there is one.

    Raises:
        ModelError: the layers differ in what one graph cannot have, or the configuration is that
            of another model.
    """
    measured = [layer.measured for layer in layers]
    names = [layer.anchor.name for layer in layers]
    _require_alike(measured, names)
    notices: list[str] = []
    windows = _windows(measured, names, known, notices)
    if known is not None and abs(known.softcap - measured[0].softcap) > 1e-3:
        notices.append(
            f"the graph caps logits at {measured[0].softcap:g} and config.json says "
            f"{known.softcap:g} (0: not at all); the graph's is kept"
        )
    chosen = [_regime(m, settings, notices) for m in measured]
    found = [
        None if turning is None else _rotation(turning, m.head_dim, index, known, notices)
        for index, (turning, m) in enumerate(zip(chosen, measured, strict=True))
    ]
    rotations, places = distinct([rotation for rotation in found if rotation is not None])
    if rotations and any(rotation is None for rotation in found):
        rotations.append(Rotation(torch.zeros_like(rotations[0].inv_freq)))
    unrotated = len(rotations) - 1 if rotations else None
    order = iter(places)
    slopes = measured[0].alibi_slopes
    attention = AttentionPlan(
        layers=tuple(
            _layer(m, window, settings) for m, window in zip(measured, windows, strict=True)
        ),
        num_attention_heads=measured[0].heads,
        rotations=tuple(rotations),
        layer_rotation=tuple(unrotated if r is None else next(order) for r in found),
        softcap=measured[0].softcap,
        alibi_slopes=None if slopes is None else torch.from_numpy(slopes).float(),
        sink_logits=any(m.sink_logits is not None for m in measured),
        sliding=tuple(window is not None for window in windows),
        notices=tuple(dict.fromkeys(notices)),
    )
    switches = [m.turning.switch for m in measured if m.turning and m.turning.switch]
    return RewritePlan(
        attention=attention,
        scales=tuple(
            m.scale / (1.0 if r is None or t is None else (r.attention_factor / t.factor) ** 2)
            for m, r, t in zip(measured, found, chosen, strict=True)
        ),
        sink_logits=tuple(m.sink_logits for m in measured),
        exact_length=min([settings.window_size, *switches]),
        is_of_long=any(t is not m.turning for t, m in zip(chosen, measured, strict=True)),
    )


def _require_alike(measured: Sequence[Measured], names: Sequence[str]) -> None:
    """One graph has one number of heads, one soft cap and one set of slopes."""
    first = measured[0]
    for one, name in zip(measured, names, strict=True):
        for what, here, there in (
            ("query heads", one.heads, first.heads),
            ("soft cap", one.softcap, first.softcap),
            ("ALiBi", one.alibi_slopes is None, first.alibi_slopes is None),
        ):
            if here != there:
                raise ModelError(f"{name} and {names[0]} differ in their {what}: {here}, {there}")
        here_slopes, there_slopes = one.alibi_slopes, first.alibi_slopes
        if here_slopes is None or there_slopes is None:
            continue
        if not np.allclose(here_slopes, there_slopes):
            raise ModelError(f"{name} and {names[0]} differ in the slopes of their ALiBi bias")


def _windows(
    measured: Sequence[Measured],
    names: Sequence[str],
    known: AttentionPlan | None,
    notices: list[str],
) -> list[int | None]:
    """Return each layer's own window; what the configuration says counts where it is narrower."""
    if known is None:
        return [m.window for m in measured]
    if len(known.layers) != len(measured):
        raise ModelError(
            f"config.json describes {len(known.layers)} layers, the graph attends "
            f"{len(measured)} times; is it the configuration of this model?"
        )
    found: list[int | None] = []
    for index, (one, spec) in enumerate(zip(measured, known.layers, strict=True)):
        here = (known.num_attention_heads, spec.num_kv_heads, spec.head_dim)
        # Some graphs cache each key for several query heads.
        repeats = one.kv_heads % spec.num_kv_heads == 0
        if (here[0], here[2]) != (one.heads, one.head_dim) or not repeats:
            raise ModelError(
                f"config.json describes {here[0]} query heads and {here[1]} key/value heads of "
                f"{here[2]}, {names[index]} has {one.heads} and {one.kv_heads} of {one.head_dim}; "
                f"is it the configuration of this model?"
            )
        own = spec.window_size if known.sliding[index] else None
        if own is not None and (one.window is None or own < one.window):
            seen = "everything" if one.window is None else f"{one.window} tokens"
            notices.append(
                f"layers see {seen} in the graph and were trained with a sliding window of {own} "
                f"by config.json: they keep that window"
            )
            found.append(own)
        else:
            found.append(one.window)
    return found


def _regime(measured: Measured, settings: LambdaConfig, notices: list[str]) -> Turning | None:
    """Return the rotation of the regime that the settings choose."""
    turning = measured.turning
    if turning is None or turning.of_long is None or turning.switch is None:
        if settings.rope_regime is not None and turning is not None:
            raise ConfigError(
                f"rope_regime={settings.rope_regime}: no rotation of this graph depends on the "
                f"length of the text; leave it out"
            )
        return turning
    is_short = settings.window_size <= turning.switch
    regime = settings.rope_regime or ("short" if is_short else "long")
    equal = (
        f"equal to the original for texts of up to {min(turning.switch, settings.window_size)}"
        if regime == "short"
        else f"which the original uses for texts longer than {turning.switch}"
    )
    notices.append(
        f"the graph's rotation changes with the length of a text, a stream has none: it is frozen "
        f"in its {regime} regime, {equal} tokens; --rope-regime sets it"
    )
    if regime == "short":
        return turning
    return replace(turning.of_long, factor=turning.factor)


def _rotation(
    turning: Turning,
    head_dim: int,
    index: int,
    known: AttentionPlan | None,
    notices: list[str],
) -> Rotation:
    """Return a layer's rotation with the frequencies that were meant, where they are known."""
    configured = None
    if known is not None:
        place = known.layer_rotation[index]
        configured = None if place is None else known.rotations[place]
    if known is not None and (configured is None or not configured.inv_freq.any()):
        notices.append("layers rotate their keys that by config.json do not")
        configured = None
    if configured is not None and not _agree(turning, configured):
        how_much = _by_how_much(turning, configured)
        notices.append(
            f"layers rotate by other frequencies than config.json says{how_much}; the graph's are "
            f"kept, so the result equals the graph and not the checkpoint of that configuration"
        )
        configured = None
    if configured is not None and turning.rotary_dim < head_dim:
        configured = _with_factor(configured, turning.factor, notices)
    if configured is not None and not turning.exact:
        return configured
    if turning.exact:
        found = torch.from_numpy(np.ascontiguousarray(turning.inv_freq)).float()
        factor = turning.factor if configured is None else configured.attention_factor
        return Rotation(found, factor, turning.interleaved)
    found_base = round_base(turning)
    ruled = None if found_base is None else found_base[1]
    if ruled is None:
        notices.append(
            f"the rotation's frequencies are read off the graph's tables to "
            f"{turning.error:.1g} radians per token: they follow no rule that is known"
        )
        ruled = torch.from_numpy(turning.inv_freq).float()
    return Rotation(ruled, turning.factor, turning.interleaved)


def _with_factor(rotation: Rotation, factor: float, notices: list[str]) -> Rotation:
    """Return a rotation of some dimensions with the graph's factor, where it has another one.

    Where all dimensions turn, the factor cannot be told from the scale, and any will do.
    """
    if abs(rotation.attention_factor / factor - 1) <= _FACTOR:
        return rotation
    notices.append(
        f"layers multiply what they rotate by {factor:.6g}, by config.json it is "
        f"{rotation.attention_factor:.6g}; the graph's is kept"
    )
    return replace(rotation, attention_factor=factor)


def _by_how_much(turning: Turning, rotation: Rotation) -> str:
    """Say how far frequencies are from others of the same number."""
    if rotation.rotary_dim != turning.rotary_dim:
        return ""
    wanted = rotation.inv_freq.double().numpy()
    share = np.abs(turning.inv_freq / wanted - 1).max()
    return f" (by up to {share:.2g} of them)"


def _agree(turning: Turning, rotation: Rotation) -> bool:
    if rotation.interleaved != turning.interleaved or rotation.rotary_dim != turning.rotary_dim:
        return False
    wanted = rotation.inv_freq.double().numpy()
    error = np.abs(wanted - turning.inv_freq)
    # What turns slowly turns too little for angles to tell more.
    return bool((error <= turning.error + 1e-6 * np.abs(wanted) + _SLOW).all())


def _layer(measured: Measured, window: int | None, settings: LambdaConfig) -> LayerSpec:
    size = settings.window_size if window is None else window
    own = window is not None
    has_sinks = not own or settings.lambda_layers == "all"
    return LayerSpec(
        num_kv_heads=measured.kv_heads,
        head_dim=measured.head_dim,
        window_size=size,
        num_sink_tokens=settings.num_sink_tokens if has_sinks else 0,
        distance_limit=size if own else settings.distance_limit,
        ring_capacity=ring_capacity(size, settings.chunk_size),
    )
