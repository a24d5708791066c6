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
from lminf_export.rewriting.masks import measure_mask
from lminf_export.rewriting.scales import measure_scale, measure_sinks
from lminf_export.rewriting.turning import Turning, measure_turning

Array = NDArray[Any]
# Windows up to this many tokens are run beyond.
_SHORT_WINDOW = 1024
# Tokens of a prompt that is compared, and windows up to which a prompt exceeds them.
_PROMPT = 64


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
    mask = measure_mask(attention)
    scale, softcap, factor = measure_scale(attention, turning, mask.slopes)
    if turning is not None:
        turning = turning.with_factor(factor)
    measured = Measured(
        heads=heads,
        kv_heads=groups,
        head_dim=attention.head_dim,
        scale=scale,
        softcap=softcap,
        window=mask.window,
        longest=attention.reach,
        turning=turning,
        alibi_slopes=mask.slopes,
        sink_logits=measure_sinks(attention, turning, scale, softcap),
    )
    _require_equal(attention, measured)
    return measured


def _require_equal(attention: Attention, measured: Measured) -> None:
    """Compare an attention with the specification on random numbers.

    Raises:
        ModelError: they differ.
    """
    reach = attention.reach
    if measured.turning is not None and measured.turning.switch is not None:
        reach = min(reach, measured.turning.switch)  # longer texts are rotated otherwise
    calls = [(min(_PROMPT, reach), 0), (1, min(11, reach - 1))]
    if measured.window is not None and measured.window <= min(_SHORT_WINDOW, reach - 4):
        calls.append((1, measured.window + 3))
        if measured.window <= _PROMPT:
            calls.append((measured.window + 3, 0))
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
