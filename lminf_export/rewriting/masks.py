"""Whom an attention lets a query see, measured: its window, its bias by distance, its sinks.

Keys of zeros give every key that is seen the same logit but for biases. What is found near is
tried far, at several lengths: chunks look like a window at the end of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.rewriting.attending import Attention

Array = NDArray[Any]
# Tokens whose weights are looked at one by one.
_NEAR = 16
# Biases of float32 are rounded; within so many tokens that is less than what is looked for.
_STEEP = 1024
# A bias of that much leaves of a number that is large enough something above zero.
_DEEPEST, _LARGE = 80.0, 1e30
_TOLERANCE = 5e-4
NO_SINK = 1e-6  # a weight that float32 hardly tells from none


@dataclass(frozen=True)
class Mask:
    """Whom a query sees.

    Attributes:
        window: keys, its own included; None for all.
        slopes: (H,) of ALiBi, or None.
        sinks: (H,) learned logits, or None.
    """

    window: int | None
    slopes: Array | None
    sinks: Array | None


def measure_mask(attention: Attention) -> Mask:
    """Find out whom an attention lets a query see.

    Raises:
        ModelError: not the last tokens, or with a bias that is not linear in the distance.
    """
    biases, window, sinks = _biases(attention)
    slopes = _slopes(attention, biases)
    if window is None:
        window = _window(attention) if slopes is None else _steep_window(attention, slopes)
    mask = Mask(window, slopes, sinks)
    _require_far(attention, mask)
    return mask


def weights_of(attention: Attention, query: Array, key: Array) -> Array:
    """Return attention's weights (H, S, T) for at most D keys."""
    total = key.shape[2]
    assert total <= attention.head_dim
    value = attention.zeros(attention.kv_heads, total)
    value[:, :, np.arange(total), np.arange(total)] = 1.0
    return attention.attend(query, key, value)[0, :, :, :total].astype(np.float64)


def _biases(attention: Attention) -> tuple[Array, int | None, Array | None]:
    """Return biases by distance (H, T), a window that is shorter than T, and logits of sinks."""
    total = min(_NEAR, attention.head_dim)
    key = attention.zeros(attention.kv_heads, total)
    weights = weights_of(attention, attention.zeros(attention.heads, total), key)
    if np.triu(weights, 1).any():
        raise ModelError(f"{attention.anchor.name} sees later tokens; expected a causal mask")
    last = weights[:, -1, ::-1]  # by distance
    if not (last[:, 0] > 0).all():
        raise ModelError(f"{attention.anchor.name} hides a token from itself")
    shown = last[0] > 0
    count = int(shown.sum())
    step = weights_of(attention, attention.zeros(attention.heads, 1), key)
    same = np.abs(step[:, 0, ::-1] - last).max() <= attention.rounding
    if not shown[:count].all() or not same:
        raise _no_window(attention)
    with np.errstate(divide="ignore"):
        biases = np.log(last) - np.log(last[:, :1])
    return biases[:, :count], (count if count < total else None), _sinks(weights[:, 0, 0])


def _sinks(alone: Array) -> Array | None:
    """Return the logits of sinks from the weights (H,) of a first token, whose logit is 0."""
    rest = 1 - alone
    if rest.max() < NO_SINK:
        return None
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(rest, 0.0) / alone)


def _slopes(attention: Attention, biases: Array) -> Array | None:
    """Return ALiBi's slopes, None without a bias."""
    if biases.shape[1] < 2 or np.abs(biases).max() < attention.rounding:
        return None
    # The farthest distance shows the slope best.
    farthest = biases.shape[1] - 1
    slopes = -biases[:, farthest] / farthest
    wanted = -slopes[:, None] * np.arange(biases.shape[1])
    if np.abs(biases - wanted).max() > attention.tolerance * max(1.0, np.abs(wanted).max()):
        raise ModelError(
            f"{attention.anchor.name} adds a bias that is not linear in the distance (ALiBi)"
        )
    return slopes


def _no_window(attention: Attention) -> ModelError:
    return ModelError(
        f"{attention.anchor.name} has a mask that is no window: expected every token of the last "
        f"ones, and no other"
    )


def _window(attention: Attention) -> int | None:
    """Return the keys that a query sees without a bias, None for all."""
    total = attention.reach
    value = attention.zeros(attention.kv_heads, total)
    value[..., 0] = 1.0
    value[..., 1] = (np.arange(total) - total / 2) / total
    query = attention.zeros(attention.heads, 1)
    key = attention.zeros(attention.kv_heads, total)
    found = attention.attend(query, key, value)[0, 0, 0].astype(np.float64)
    mean = found[1] / found[0] * total + total / 2
    guess = round(2 * (total - 1 - mean)) + 1
    for window in (guess, guess - 1, guess + 1, guess - 2, guess + 2):
        if 1 <= window <= total and _sees_exactly(attention, total, window):
            return None if window >= total else window
    raise _no_window(attention)


def _sees_exactly(attention: Attention, total: int, window: int) -> bool:
    """Say whether a query sees the farthest key of a window, and none beyond."""
    farthest = total - window
    seen = _sees(attention, total, farthest, farthest + 1)
    return seen and (not farthest or not _sees(attention, total, 0, farthest))


def _sees(attention: Attention, total: int, start: int, end: int) -> bool:
    """Say whether the last of some tokens sees any key of a range, by the flattest head."""
    value = attention.zeros(attention.kv_heads, total)
    value[:, :, start:end, 0] = _LARGE / total
    query = attention.zeros(attention.heads, 1)
    found = attention.attend(query, attention.zeros(attention.kv_heads, total), value)
    return bool(found[0, :, 0, 0].any())


def _steep_window(attention: Attention, slopes: Array) -> int | None:
    """Return the keys that a query sees with ALiBi, None for all, as far as any key counts."""
    flattest = float(np.abs(slopes).min())
    total = attention.reach if not flattest else min(attention.reach, int(_DEEPEST / flattest))
    total = max(total, min(attention.reach, _NEAR))
    if _sees(attention, total, 0, 1):
        return None
    shown, hidden = 1, total
    while hidden - shown > 1:
        middle = (shown + hidden) // 2
        seen = _sees(attention, total, 0, total - middle + 1)
        shown, hidden = (middle, hidden) if seen else (shown, middle)
    return shown


def _require_far(attention: Attention, mask: Mask) -> None:
    """Compare means of random values with what the mask lets expect, at several lengths.

    Raises:
        ModelError: they differ.
    """
    reach = attention.reach if mask.slopes is None else min(attention.reach, _STEEP)
    totals = {reach, 2 * reach // 3}
    if mask.window is not None:
        window = mask.window
        totals |= {reach - window // 2 - 1, window + window // 2 + 1, 2 * window + 1}
    shape = (1, attention.kv_heads, reach, attention.head_dim)
    values = np.random.default_rng(reach).random(shape, dtype=np.float32) - np.float32(0.5)
    for total in sorted(n for n in totals if 1 < n <= reach):
        value = values[:, :, :total]
        key = attention.zeros(attention.kv_heads, total)
        found = attention.attend(attention.zeros(attention.heads, 1), key, value)[0, :, 0]
        wanted = _mean(mask, value[0], attention.heads)
        if not np.abs(found - wanted).max() <= _allowed(attention) * np.abs(wanted).max():
            raise _no_window(attention)


def _allowed(attention: Attention) -> float:
    return max(_TOLERANCE, 2 * attention.eps)


def _mean(mask: Mask, value: Array, heads: int) -> Array:
    """Return (H, D): means of values (G, T, D), weighed as the mask says."""
    groups, total, _ = value.shape
    distance = np.arange(total - 1, -1, -1)
    slopes = np.zeros(heads) if mask.slopes is None else mask.slopes
    logits = -slopes[:, None] * distance
    if mask.window is not None:
        logits = np.where(distance < mask.window, logits, -np.inf)
    weights = np.exp(logits)
    rest = 0.0 if mask.sinks is None else np.exp(mask.sinks)
    weights /= (weights.sum(1) + rest)[:, None]
    grouped = weights.reshape(groups, heads // groups, total)
    mean: Array = (grouped @ value).reshape(heads, -1)
    return mean
