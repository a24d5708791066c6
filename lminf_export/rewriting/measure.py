"""The numbers that describe an attention of a foreign graph, measured by running it.

The part between the new tokens' queries, keys and values and attention's output is run on chosen
numbers. Keys of nothing but zeros show masks and biases, one key of known length the scale and the
soft cap, the cached keys the rotation. Last, the result is compared with the specification on
random numbers: an attention that is not of this kind is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.operator.reference import attend_by_distance
from lminf_export.rewriting.attending import Attention
from lminf_export.rewriting.turning import Turning, measure_turning

Array = NDArray[Any]
_TOLERANCE = 2e-4
# Windows up to this many tokens are run beyond.
_SHORT_WINDOW = 1024


@dataclass(frozen=True)
class Measured:
    """The numbers that describe one attention.

    Attributes:
        heads: H.
        kv_heads: G.
        head_dim: D.
        scale: factor of every logit.
        softcap: 0 for none.
        window: keys a query sees, its own included; None for all.
        longest: tokens up to which the window was looked for.
        turning: the rotation, None for none.
        alibi_slopes: (H,) or None.
        sink_logits: (H,) or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int | None
    longest: int
    turning: Turning | None
    alibi_slopes: Array | None
    sink_logits: Array | None


def measure(attention: Attention) -> Measured:
    """Find out what an attention computes.

    Raises:
        ModelError: it is none that Λ-attention can take the place of.
    """
    heads, groups = attention.heads, attention.kv_heads
    if heads % groups:
        raise ModelError(
            f"{attention.anchor.name} has {heads} query heads and {groups} key/value heads; "
            f"expected a multiple"
        )
    turning = measure_turning(attention)
    biases, hidden, sinks = _biases(attention)
    slopes = _slopes(attention, biases)
    window, longest = hidden, 0
    if window is None and slopes is None:
        window, longest = _window(attention)
    scale, softcap, factor = _scale(attention, turning, slopes)
    if turning is not None:
        turning = turning.with_factor(factor)
    measured = Measured(
        heads=heads,
        kv_heads=groups,
        head_dim=attention.head_dim,
        scale=scale,
        softcap=softcap,
        window=window,
        longest=longest,
        turning=turning,
        alibi_slopes=slopes,
        sink_logits=sinks,
    )
    _require_equal(attention, measured)
    _require_alike_far(attention, measured)
    return measured


def _weights(attention: Attention, query: Array, key: Array) -> Array:
    """Return attention's weights (H, S, T) for at most D keys."""
    total = key.shape[2]
    assert total <= attention.head_dim
    value = attention.zeros(attention.kv_heads, total)
    value[:, :, np.arange(total), np.arange(total)] = 1.0
    return attention.attend(query, key, value)[0, :, :, :total].astype(np.float64)


def _biases(attention: Attention) -> tuple[Array, int | None, Array | None]:
    """Return biases by distance (H, T), a window that is shorter than T, and logits of sinks."""
    total = min(16, attention.head_dim)
    key = attention.zeros(attention.kv_heads, total)
    weights = _weights(attention, attention.zeros(attention.heads, total), key)
    if np.triu(weights, 1).any():
        raise ModelError(f"{attention.anchor.name} sees later tokens; expected a causal mask")
    last = weights[:, -1, ::-1]  # by distance
    if not (last[:, 0] > 0).all():
        raise ModelError(f"{attention.anchor.name} hides a token from itself")
    shown = last[0] > 0
    count = int(shown.sum())
    step = _weights(attention, attention.zeros(attention.heads, 1), key)
    same = np.abs(step[:, 0, ::-1] - last).max() <= attention.rounding
    if not shown[:count].all() or not same:
        raise ModelError(f"{attention.anchor.name} has a mask that is no window")
    with np.errstate(divide="ignore"):
        biases = np.log(last) - np.log(last[:, :1])
    rest = 1 - last.sum(-1)
    sinks = None
    if np.abs(rest).max() > attention.rounding:
        sinks = np.log(np.maximum(rest, 1e-30) / last[:, 0])
    return biases[:, :count], (count if count < total else None), sinks


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


def _window(attention: Attention) -> tuple[int | None, int]:
    """Return the keys a query sees, None for all, and the tokens up to which that was tried."""
    for total in attention.lengths():
        try:
            return _window_within(attention, total), total
        except ModelError:
            if total == attention.lengths()[-1]:
                raise
    raise AssertionError("there is a shortest length")


def _window_within(attention: Attention, total: int) -> int | None:
    value = attention.zeros(attention.kv_heads, total)
    value[..., 0] = 1.0
    value[..., 1] = (np.arange(total) - total / 2) / total
    query = attention.zeros(attention.heads, 1)
    key = attention.zeros(attention.kv_heads, total)
    found = attention.attend(query, key, value)[0, 0, 0].astype(np.float64)
    mean = found[1] / found[0] * total + total / 2
    guess = round(2 * (total - 1 - mean)) + 1
    for window in (guess, guess - 1, guess + 1, guess - 2, guess + 2):
        if not _sees_exactly(attention, total, window):
            continue
        if window >= total:
            return None
        # A chunk of fixed positions looks like a window to the last token of one.
        other = total - window // 2 - 1
        if _sees_exactly(attention, other, min(window, other)):
            return window
    raise ModelError(f"{attention.anchor.name} has a mask that is no window")


def _sees_exactly(attention: Attention, total: int, window: int) -> bool:
    """Say whether the last of so many tokens sees all of its window, and nothing before it."""
    if window < 1 or window > total:
        return False
    value = attention.zeros(attention.kv_heads, total)
    value[:, :, total - window, 0] = 1.0
    value[:, :, : total - window, 1] = 1.0
    value[..., 2] = 1.0
    query = attention.zeros(attention.heads, 1)
    key = attention.zeros(attention.kv_heads, total)
    found = attention.attend(query, key, value)[0, :, 0].astype(np.float64)
    if not (found[:, 0] > 0).all() or found[:, 1].any():
        return False
    # All weights are equal, so those of all over that of one is their number.
    return bool((np.abs(found[:, 2] / found[:, 0] - window) < 0.5).all())


def _scale(
    attention: Attention, turning: Turning | None, slopes: Array | None
) -> tuple[float, float, float]:
    """Return the scale, the soft cap, and the rotation's factor that is not in the scale."""
    dims = attention.head_dim
    rotated = turning.rotary_dim if turning is not None else dims
    scale, softcap = _scale_along(attention, 0, slopes)
    if rotated == dims:
        return scale, softcap, 1.0
    passed, _ = _scale_along(attention, dims - 1, slopes)
    factor = (scale / passed) ** 0.5
    return passed, softcap, 1.0 if abs(factor - 1) < attention.rounding else factor


def _scale_along(attention: Attention, dim: int, slopes: Array | None) -> tuple[float, float]:
    """Return scale and soft cap from the logits of one key along one dimension."""
    slope = 0.0 if slopes is None else float(slopes[0])

    def logit(product: float) -> float:
        return _logit(attention, dim, product) - slope

    product = 1.0
    for _ in range(3):  # to a logit of about 1, where no cap shows yet
        product /= max(logit(product), 1e-3)
    products = np.array([0.25, 1.0, 4.0, 16.0, 48.0]) * product
    logits = np.array([logit(product) for product in products])
    ratio = logits / products
    if np.abs(ratio[1:] / ratio[1] - 1).max() < max(_TOLERANCE, attention.eps):
        return _snapped(float(ratio[3]), attention.rounding), 0.0
    cap = _cap(products, logits)
    scale = float(np.mean(cap * np.arctanh(logits[1:3] / cap) / products[1:3]))
    return _snapped(scale, attention.rounding), cap


def _logit(attention: Attention, dim: int, product: float) -> float:
    """Return the logit of the token's own key, less that of a key of zeros one before it."""
    query, key = attention.zeros(attention.heads, 2), attention.zeros(attention.kv_heads, 2)
    query[:, :, 1, dim] = key[:, :, 1, dim] = product**0.5
    weights = _weights(attention, query, key)[0, 1]
    if not weights[1] > 0 or not weights[0] > 0:
        raise ModelError(f"{attention.anchor.name} multiplies queries by keys in no known way")
    return float(np.log(weights[1]) - np.log(weights[0]))


def _cap(products: Array, logits: Array) -> float:
    """Return c of logits = c·tanh(s·products / c), by halving."""

    def error(cap: float) -> float:
        near, far = (cap * np.arctanh(min(x / cap, 1 - 1e-12)) for x in (logits[2], logits[4]))
        return float(far / products[4] - near / products[2])

    low, high = float(logits.max()) * (1 + 1e-9), 1e6
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error(middle) > 0 else (low, middle)
    cap = (low * high) ** 0.5
    near = round(cap * 4) / 4
    return near if near and abs(cap / near - 1) < 1e-3 else cap


def _snapped(scale: float, rounding: float) -> float:
    """Return the scale that was meant: a root of a whole number, or a round one, if it is near."""
    count = round(scale**-2)
    if count and abs(scale / count**-0.5 - 1) < rounding:
        return float(count**-0.5)
    inverse = round(1 / scale)
    if inverse and abs(scale * inverse - 1) < rounding:
        return 1.0 / inverse
    short = float(f"{scale:.5g}")
    return short if abs(scale / short - 1) < 1e-6 else scale


def _require_equal(attention: Attention, measured: Measured) -> None:
    """Compare an attention with the specification on random numbers.

    Raises:
        ModelError: they differ.
    """
    calls = [(12, 0), (1, 11)]
    if measured.window is not None and measured.window <= min(
        _SHORT_WINDOW, attention.lengths()[0] - 4
    ):
        calls.append((1, measured.window + 3))
    for new, past in calls:
        rng = np.random.default_rng(past)
        query = rng.standard_normal((1, measured.heads, new, measured.head_dim))
        key = rng.standard_normal((1, measured.kv_heads, past + new, measured.head_dim))
        value = rng.standard_normal(key.shape)
        wanted = specified(measured, query, key, value)
        cached = key.astype(np.float32)
        if past:
            cached[:, :, :past] = attention.cached_keys(cached[:, :, :past], 0)
        found = attention.attend(query.astype(np.float32), cached, value.astype(np.float32))
        error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        if not error <= attention.tolerance:
            raise ModelError(
                f"{attention.anchor.name} is not understood: by what was measured of it, its "
                f"output with {past} earlier tokens is off by {error:.2g}, at most "
                f"{attention.tolerance:.2g} is rounding"
            )


def _require_alike_far(attention: Attention, measured: Measured) -> None:
    """Check that far tokens are scaled as near ones, where masks and rotations were looked for.

    Raises:
        ModelError: the scale depends on the position.
    """
    turning = measured.turning
    if measured.alibi_slopes is not None or not measured.longest:
        return
    total = measured.longest
    if turning is not None and turning.switch is not None:
        total = min(total, turning.switch)
    factor = 1.0 if turning is None else turning.factor
    wanted = 4.0
    query = attention.zeros(attention.heads, 1)
    key = attention.zeros(attention.kv_heads, total)
    query[..., 0] = key[:, :, -1, 0] = (wanted / (measured.scale * factor**2)) ** 0.5
    value = attention.zeros(attention.kv_heads, total)
    value[:, :, -1, 0] = 1.0
    value[:, :, :-1, 1] = 1.0
    found = attention.attend(query, key, value)[0, :, 0].astype(np.float64)
    others = min(measured.window or total, total) - 1
    logits = np.log(found[:, 0]) - np.log(found[:, 1] / others)
    if measured.softcap:
        wanted = measured.softcap * np.tanh(wanted / measured.softcap)
    error = np.abs(logits / wanted - 1).max()
    if not error <= 4 * attention.tolerance:
        raise ModelError(
            f"{attention.anchor.name} scales the logits of token {total} by another "
            f"{1 + error:.3g} times than those of the first: queries that grow with the position "
            f"(attention temperature) cannot be followed by a graph that knows distances only"
        )


def specified(measured: Measured, query: Array, key: Array, value: Array) -> Array:
    """Return what the specification makes of queries, keys and values, none of them rotated."""
    total, new = key.shape[2], query.shape[2]
    turning = measured.turning

    def tensor(array: Array | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(np.asarray(array, np.float64))

    query_, key_, value_ = (torch.from_numpy(x) for x in (query, key, value))
    return attend_by_distance(
        query_,
        key_,
        value_,
        torch.arange(total - new, total)[None],
        torch.arange(total)[None],
        window_size=measured.window or total,
        num_sink_tokens=0,
        distance_limit=measured.window or total,
        scale=measured.scale,
        inv_freq=None if turning is None else torch.from_numpy(turning.inv_freq),
        attention_factor=1.0 if turning is None else turning.factor,
        interleaved=turning is not None and turning.interleaved,
        softcap=measured.softcap,
        alibi_slopes=tensor(measured.alibi_slopes),
        sink_logits=tensor(measured.sink_logits),
    ).numpy()
