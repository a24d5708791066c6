"""What an attention of a foreign graph computes, measured by running it.

The part between the new tokens' queries, keys and values and attention's output is run on chosen
numbers. Keys of nothing but zeros show masks and biases, one key of known length the scale and the
soft cap, the cached keys the rotation. Last, the result is compared with the specification on
random numbers: an attention that is not of this kind is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.operator.reference import attend_by_distance
from lminf_export.rewriting.anchors import Anchor
from lminf_export.rewriting.feeds import Call, Inputs, numpy_dtype
from lminf_export.rewriting.layouts import Layout
from lminf_export.rewriting.parts import Parts
from lminf_export.rewriting.turning import Turning, measure_turning

Array = NDArray[Any]
# Bytes that one measurement's keys and values may take.
_LARGEST = 2**27
_LENGTHS = [2**k for k in range(17, 4, -1)]
_TOLERANCE = 2e-4
_ROUNDING = 2e-5
# Windows up to this many tokens are run beyond.
_SHORT_WINDOW = 1024


@dataclass(frozen=True)
class Layouts:
    """Layouts of what one attention takes and gives."""

    query: Layout
    key: Layout
    value: Layout
    output: Layout


@dataclass(frozen=True)
class Measured:
    """What one attention computes.

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


class Attention:
    """One attention of a graph, ready to be run.

    Args:
        parts: of the graph.
        inputs: of the graph.
        anchor: where it is.
        layouts: of its tensors.
        head_dims: of caches whose last dimension is open.
        longest: tokens that the graph's tables reach, None for no limit.
    """

    def __init__(
        self,
        parts: Parts,
        inputs: Inputs,
        anchor: Anchor,
        layouts: Layouts,
        head_dims: Mapping[str, int],
        longest: int | None,
    ) -> None:
        self.parts, self.inputs, self.anchor = parts, inputs, anchor
        # Of numbers near 1 in the graph's type: its tables are rounded to that.
        self.eps = {2: 2.0**-10, 4: 0.0}[numpy_dtype(anchor.past_key).itemsize]
        if anchor.past_key.dtype == ir.DataType.BFLOAT16:
            self.eps = 2.0**-7
        self.layouts, self.head_dims, self.longest = layouts, head_dims, longest
        self.heads, self.kv_heads = layouts.query.heads, layouts.key.heads
        self.head_dim = layouts.query.head_dim

    @property
    def tolerance(self) -> float:
        """Largest error of an output, relative to the largest output."""
        return max(_TOLERANCE, 4 * self.eps)

    @property
    def rounding(self) -> float:
        """Largest relative error of a number that is computed once."""
        return max(_ROUNDING, 2 * self.eps)

    def _feeds(self, new: int, past: int, masked: int | None) -> dict[Any, Array]:
        return self.inputs.feeds(Call(new, past, self.head_dims, masked))

    def zeros(self, heads: int, tokens: int) -> Array:
        """(1, heads, tokens, D)."""
        return np.zeros((1, heads, tokens, self.head_dim), np.float32)

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Return (1, H, S, D).

        Args:
            query: (1, H, S, D), not rotated.
            key: (1, G, P + S, D), the first P as they are cached.
            value: (1, G, P + S, D).
        """
        new = query.shape[2]
        past = key.shape[2] - new
        anchor, layouts = self.anchor, self.layouts
        given = self._feeds(new, past, None)
        given[anchor.past_key] = self._cache(key[:, :, :past], given[anchor.past_key])
        given[anchor.past_value] = self._cache(value[:, :, :past], given[anchor.past_value])
        given[anchor.query] = layouts.query.from_heads(query)
        given[anchor.key] = layouts.key.from_heads(key[:, :, past:])
        given[anchor.value] = layouts.value.from_heads(value[:, :, past:])
        (found,) = self.parts.run([anchor.output], given)
        return layouts.output.to_heads(found)

    @staticmethod
    def _cache(tokens: Array, like: Array) -> Array:
        """Return a cache that begins with some tokens."""
        if like.shape == tokens.shape:
            return np.ascontiguousarray(tokens)
        cache = like.copy()
        cache[:, :, : tokens.shape[2]] = tokens
        return cache

    def cached_keys(self, key: Array, past: int, masked: int | None = None) -> Array:
        """Return new keys (1, G, S, D) as they are cached behind P others."""
        given = self._feeds(key.shape[2], past, masked)
        query = self.zeros(self.heads, key.shape[2])
        given[self.anchor.query] = self.layouts.query.from_heads(query)
        given[self.anchor.value] = self.layouts.value.from_heads(np.zeros_like(key))
        given[self.anchor.key] = self.layouts.key.from_heads(key)
        (found,) = self.parts.run([self.anchor.keys], given)
        wanted = (1, self.kv_heads, self.head_dim)
        if found.ndim != 4 or (found.shape[0], found.shape[1], found.shape[3]) != wanted:
            raise ModelError(
                f"{self.anchor.name} caches keys of shape {found.shape}; expected (batch, "
                f"{self.kv_heads} heads, tokens, {self.head_dim})"
            )
        return found[:, :, past : past + key.shape[2]]

    def fingerprint(self) -> bytes:
        """Return what is equal for attentions that compute the same."""
        given = self._feeds(2, 1, None)
        anchor = self.anchor
        given |= {v: np.zeros((1,), np.float32) for v in (anchor.query, anchor.key, anchor.value)}
        return self.parts.digest([anchor.output, anchor.keys], given) + repr(self.layouts).encode()

    def lengths(self) -> list[int]:
        """Numbers of tokens to try, longest first."""
        row = 4 * 4 * self.kv_heads * self.head_dim
        most = min(_LARGEST // row, self.longest or _LENGTHS[0])
        return list(dict.fromkeys([min(n, most) for n in _LENGTHS]))


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
        if _sees_exactly(attention, total, window):
            return None if window >= total else window
    raise ModelError(f"{attention.anchor.name} has a mask that is no window")


def _sees_exactly(attention: Attention, total: int, window: int) -> bool:
    if window < 1 or window > total:
        return False
    value = attention.zeros(attention.kv_heads, total)
    value[:, :, total - window, 0] = 1.0
    if window < total:
        value[:, :, : total - window, 1] = 1.0
    found = attention.attend(
        attention.zeros(attention.heads, 1), attention.zeros(attention.kv_heads, total), value
    )[0, 0, 0]
    return bool(found[0] > 0 and found[1] == 0)


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
