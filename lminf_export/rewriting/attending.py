"""One attention of a foreign graph, cut out and ready to be run on any queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.rewriting.feeds import Call, Inputs, numpy_dtype
from lminf_export.rewriting.layouts import Layouts
from lminf_export.rewriting.parts import Parts
from lminf_export.rewriting.searching import Anchor

Array = NDArray[Any]
# Bytes that one measurement's keys and values may take; to see what lies behind a change, more.
_LARGEST, _LARGEST_CHANGE = 2**27, 2**29
_BEYOND = 192  # tokens behind a change that are looked at
_LENGTHS = [2**k for k in range(17, 4, -1)]
# Largest error of an output, and of a number that is computed once, relative to it, in float32.
_TOLERANCE = 2e-4
_ROUNDING = 2e-5


class Attention:
    """One attention of a graph, ready to be run.

    Args:
        parts: of the graph.
        inputs: of the graph.
        anchor: where it is.
        layouts: of its tensors.
        head_dims: of caches whose last dimension is open.
        longest: tokens that the graph's tables reach, None for no limit.
        changes: tokens that the graph compares a length with, 0 for none: what it does changes
            there, perhaps.
    """

    def __init__(
        self,
        parts: Parts,
        inputs: Inputs,
        anchor: Anchor,
        layouts: Layouts,
        head_dims: Mapping[str, int],
        longest: int | None,
        changes: int = 0,
    ) -> None:
        self.parts, self.inputs, self.anchor = parts, inputs, anchor
        # Tables of half precision are rounded by so much near 1; those of float32 by nothing here.
        dtype = numpy_dtype(anchor.past_key)
        self.eps = float(ml_dtypes.finfo(dtype).eps) if dtype.itemsize < 4 else 0.0
        self.layouts, self.head_dims = layouts, head_dims
        self.longest, self.changes = longest, changes
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

    def _feeds(self, new: int, past: int) -> dict[ir.Value, Array]:
        """Return arrays for the graph's inputs, and empty caches in the usual layout."""
        call = Call(new, past, self.head_dims)
        caches = (self.anchor.past_key, self.anchor.past_value)
        return self.inputs.feeds(call) | {
            cache: self.inputs.empty_cache(cache, call) for cache in caches
        }

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
        given = self._feeds(new, past)
        for cache, tokens in ((anchor.past_key, key), (anchor.past_value, value)):
            given[cache] = self._cache(tokens[:, :, :past], given[cache])
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

    def cached_keys(self, key: Array, past: int) -> Array:
        """Return new keys (1, G, S, D) as they are cached behind P others."""
        given = self._feeds(key.shape[2], past)
        query = self.zeros(self.heads, key.shape[2])
        given[self.anchor.query] = self.layouts.query.from_heads(query)
        given[self.anchor.value] = self.layouts.value.from_heads(np.zeros_like(key))
        given[self.anchor.key] = self.layouts.key.from_heads(key)
        (found,) = self.parts.run([self.anchor.keys], given)
        return found[:, :, past : past + key.shape[2]]

    def fingerprint(self) -> bytes:
        """Return what is equal for attentions that compute the same."""
        given = self._feeds(2, 1)
        anchor = self.anchor
        given |= {v: np.zeros((1,), np.float32) for v in (anchor.query, anchor.key, anchor.value)}
        return self.parts.digest([anchor.output, anchor.keys], given) + repr(self.layouts).encode()

    @cached_property
    def reach(self) -> int:
        """The most tokens that a text may have here: beyond, tables end."""
        lengths = self._lengths()
        for total in lengths:
            key = np.ones((1, self.kv_heads, 1, self.head_dim), np.float32)
            zeros = self.zeros(self.kv_heads, total)
            try:
                self.cached_keys(key, total - 1)
                self.attend(self.zeros(self.heads, 1), zeros, zeros)
            except ModelError:
                if total == lengths[-1]:
                    raise
            else:
                return total
        raise AssertionError("there is a shortest length")

    def _lengths(self) -> list[int]:
        """Numbers of tokens to try, longest first."""
        row = 4 * 4 * self.kv_heads * self.head_dim
        most = max(_LARGEST, min(_LARGEST_CHANGE, (self.changes + _BEYOND) * row)) // row
        most = min(most, self.longest or _LENGTHS[0])
        return list(dict.fromkeys([min(n, most) for n in _LENGTHS]))
