"""The scale and the soft cap of an attention: how a product of query and key becomes a logit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.rewriting.attending import Attention
from lminf_export.rewriting.masks import NO_SINK, weights_of
from lminf_export.rewriting.turning import Turning

Array = NDArray[Any]
_TOLERANCE = 2e-4
_TRIED = range(-30, 31, 6)  # logits
_TOLERANCE_ONCE = 2e-5  # of a number that float32 computes once


def measure_scale(
    attention: Attention, turning: Turning | None, slopes: Array | None
) -> tuple[float, float, float]:
    """Return the scale, the soft cap, and the rotation's factor that is not in the scale.

    Raises:
        ModelError: logits are no products, or the same product has another one far behind.
    """
    dims = attention.head_dim
    rotated = turning.rotary_dim if turning is not None else dims
    dim, near = _slowest(attention, turning)
    scale, softcap = _scale_along(attention, dim, slopes, near)
    passed, factor = scale, 1.0
    if rotated < dims:
        passed, _ = _scale_along(attention, dims - 1, slopes, _TOLERANCE_ONCE)
        factor = (scale / passed) ** 0.5
        factor = 1.0 if abs(factor - 1) < near else factor
    factors = np.where(np.arange(dims) < rotated, scale, passed)
    _require_same_far(attention, factors, softcap, slopes)
    return passed, softcap, factor


def measure_sinks(
    attention: Attention, turning: Turning | None, scale: float, softcap: float
) -> Array | None:
    """Return the logits (H,) of learned sinks, -inf for a head that has none; None without any.

    A first token sees itself and the sink. Its own logit is moved until both weigh about the same,
    where float32 tells them best.
    """
    dim, _ = _slowest(attention, turning)
    along = scale if turning is None else scale * turning.factor**2
    found = np.full(attention.heads, -np.inf)
    nearest = np.full(attention.heads, 0.5 - NO_SINK)
    for logit in _TRIED:
        query, key = attention.zeros(attention.heads, 1), attention.zeros(attention.kv_heads, 1)
        query[..., dim] = (abs(logit / along)) ** 0.5
        key[..., dim] = np.sign(logit) * query[0, 0, 0, dim]
        own = weights_of(attention, query, key)[:, 0, 0]
        capped = softcap * np.tanh(logit / softcap) if softcap else logit
        better = np.abs(own - 0.5) < nearest
        nearest[better] = np.abs(own - 0.5)[better]
        found[better] = capped + np.log((1 - own[better]) / own[better])
    return None if np.isneginf(found).all() else found


def _slowest(attention: Attention, turning: Turning | None) -> tuple[int, float]:
    """Return the dimension that turns least, and how far rounding may move a scale along it.

    A table in half precision makes cos² + sin² of one token's angle something beside 1. A pair that
    hardly turns has a cosine of 1 in any table, and a sine that counts for nothing.
    """
    if turning is None:
        return 0, _TOLERANCE_ONCE
    pair = int(np.argmin(np.abs(turning.inv_freq)))
    moved = min(attention.rounding, float(turning.inv_freq[pair]) ** 2)
    return pair * (2 if turning.interleaved else 1), max(_TOLERANCE_ONCE, moved)


def _scale_along(
    attention: Attention, dim: int, slopes: Array | None, near: float
) -> tuple[float, float]:
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
        return _snapped(float(ratio[3]), near), 0.0
    cap = _cap(products, logits)
    scale = float(np.mean(cap * np.arctanh(logits[1:3] / cap) / products[1:3]))
    return _snapped(scale, near), cap


def _logit(attention: Attention, dim: int, product: float) -> float:
    """Return the logit of the token's own key, less that of a key of zeros one before it."""
    query, key = attention.zeros(attention.heads, 2), attention.zeros(attention.kv_heads, 2)
    query[:, :, 1, dim] = key[:, :, 1, dim] = product**0.5
    weights = weights_of(attention, query, key)[0, 1]
    if not weights[1] > 0 or not weights[0] > 0:
        raise ModelError(f"{attention.anchor.name} multiplies queries by keys in no known way")
    return float(np.log(weights[1]) - np.log(weights[0]))


def _require_same_far(
    attention: Attention, factors: Array, softcap: float, slopes: Array | None
) -> None:
    """Check that the last token's product with its own key counts as much as the first one's.

    A rotation turns both alike. A factor that grows with the position (a temperature), or queries
    that are turned otherwise than keys, do not leave it as it is.

    Raises:
        ModelError: it counts otherwise.
    """
    total = attention.reach
    if total < 2:
        return
    turned = np.random.default_rng(1).standard_normal(attention.head_dim)
    turned /= np.sqrt((factors * turned**2).sum())  # to a logit of 1
    key = attention.zeros(attention.kv_heads, total)
    key[:, :, -1] = turned
    value = attention.zeros(attention.kv_heads, total)
    value[:, :, -1, 0] = value[:, :, -2, 1] = 1.0
    query = attention.zeros(attention.heads, 1)
    query[:] = turned
    found = attention.attend(query, key, value)[0, :, 0, :2].astype(np.float64)
    steepest = 0.0 if slopes is None else slopes
    wanted = softcap * np.tanh(1 / softcap) if softcap else 1.0
    with np.errstate(divide="ignore"):
        logits = np.log(found[:, 0]) - np.log(found[:, 1]) - steepest
    if not np.abs(logits - wanted).max() <= _far_tolerance(attention, slopes, total):
        raise ModelError(
            f"{attention.anchor.name} weighs the same product otherwise at position {total - 1} "
            f"than at the start (a temperature by position, or queries turned otherwise than keys)"
        )


def _far_tolerance(attention: Attention, slopes: Array | None, total: int) -> float:
    """Return what rounding makes of a logit of 1; a bias of float32 is rounded at its size."""
    bias = 0.0 if slopes is None else float(np.abs(slopes).max()) * total * 2.0**-22
    return max(1e-3, 8 * attention.eps) + bias


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


def _snapped(scale: float, near: float) -> float:
    """Return the scale that was meant: a root of a whole number, or a round one, if it is near."""
    count = round(scale**-2)
    if count and abs(scale / count**-0.5 - 1) < near:
        return float(count**-0.5)
    inverse = round(1 / scale)
    if inverse and abs(scale * inverse - 1) < near:
        return 1.0 / inverse
    short = float(f"{scale:.5g}")
    return short if abs(scale / short - 1) < 1e-6 else scale
