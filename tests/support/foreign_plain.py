"""Attention of foreign graphs in plain operators, each part in the ways that exporters write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.support.foreign_attention import (
    distances,
    float_mask,
    hidden_keys,
    query_numbers,
    rotated,
    row_numbers,
)
from tests.support.foreign_decoders import MICROSOFT, Graph


@dataclass(frozen=True)
class Plain:
    """How one attention is written; every field has the values that its branch names.

    Attributes:
        scale: "div", "mul" of the scores; "query", "key", "both"; "alpha" of FusedMatMul.
        mask: "add", "where", "slope-table", "slope-sums" (ALiBi), "features", or one of `_MASKS`.
        cast: whether the softmax is computed in float32.
        repeat: "expand", "tile", "gather", "grouped", "none".
        product: "matmul", "einsum", "fused".
        rotate: "split", "slices", "node", "interleaved", "complex".
        angles: "table", "products", "gathered-angles".
        positions: "input", "sums", "cache", "mask".
        cache: "concat", "nd", "scatter", "tokens-first".
        wrong: what makes it something else.
    """

    scale: str = "div"
    mask: str = "add"
    cast: bool = False
    repeat: str = "expand"
    product: str = "matmul"
    rotate: str = "split"
    angles: str = "table"
    positions: str = "input"
    cache: str = "concat"
    wrong: str = ""

    def __call__(self, graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        """Write it; return (B, S, H·D)."""
        spec = graph.spec
        features = query
        if self.rotate == "node":
            query = rotated(graph, query, spec.heads, "rows")
            key = rotated(graph, key, spec.kv_heads, "rows")
        query = graph.heads(query, spec.heads)
        key, value = graph.heads(key, spec.kv_heads), graph.heads(value, spec.kv_heads)
        if spec.qk_norm:
            query = _normed(graph, query, f"q_norm{layer}")
            key = _normed(graph, key, f"k_norm{layer}")
        if spec.rotary_dim and self.rotate != "node":
            query, key = self._turned(graph, query, 1.0), self._turned_key(graph, key)
        keys, values = (
            self._cached(graph, layer, "key", key),
            self._cached(graph, layer, "value", value),
        )
        if self.wrong == "cached-before-rotation":
            keys = self._turn(graph, keys, row_numbers(graph), 1.0)
        if self.wrong == "temperature":
            query = graph.Mul(query, _temperature(graph))
        if self.wrong == "norm-of-rotated":
            query = _normed(graph, query, f"q_norm{layer}")
        scores, values = self._scores(graph, query, keys, values)
        if spec.softcap:
            cap = graph.array(spec.softcap)
            scores = graph.Mul(graph.Tanh(graph.Div(scores, cap)), cap)
        scores = self._masked(graph, scores, features)
        weights = self._softmax(graph, scores, layer)
        found = (
            graph.Einsum(weights, values, equation="bhst,bhtd->bhsd")
            if (self.product == "einsum")
            else graph.MatMul(weights, values)
        )
        if self.repeat == "grouped":
            shape = graph.Concat(
                graph.ints(0, spec.heads), graph.size("input_ids", 1), graph.ints(spec.dim), axis=0
            )
            found = graph.Reshape(found, shape)
        return graph.flat(found)

    # Rotation.

    def _turned_key(self, graph: Graph, key: str) -> str:
        if self.wrong == "cached-before-rotation":
            return key
        return self._turned(graph, key, 2.0 if self.wrong == "two-bases" else 1.0)

    def _turned(self, graph: Graph, x: str, faster: float) -> str:
        if self.positions == "input":
            places = graph.positions()
        elif self.positions == "sums":
            sums = graph.Sub(graph.CumSum(graph.mask(), graph.integer(1)), graph.integer(1))
            new = graph.Neg(graph.size("input_ids", 1))
            last = graph.array([np.iinfo(np.int64).max], np.int64)
            places = graph.Slice(sums, new, last, graph.ints(1))
        elif self.positions == "cache":
            start = graph.size(graph.past(0, "key"), 2)
            end = graph.Add(start, graph.size("input_ids", 1))
            limits = [graph.Squeeze(n) for n in (start, end)]
            places = graph.Range(*limits, graph.integer(1))
        else:
            places = query_numbers(graph)
        return self._turn(graph, x, places, faster)

    def _turn(self, graph: Graph, x: str, places: str, faster: float) -> str:
        """Rotate (B, H, S, D) at places (S,) or (B, S)."""
        spec = graph.spec
        flat = graph.Reshape(places, graph.ints(-1))
        speeds = (spec.inv_freq * np.float32(faster)).astype(np.float32)
        rows = np.arange(128, dtype=np.float32)[:, None] * speeds
        if self.angles == "table":
            cos = graph.Gather(graph.array(np.cos(rows)), flat)
            sin = graph.Gather(graph.array(np.sin(rows)), flat)
        elif self.angles == "gathered-angles":
            angles = graph.Gather(graph.array(rows), flat)
            cos, sin = graph.Cos(angles), graph.Sin(angles)
        else:
            column = graph.Unsqueeze(graph.Cast(flat, to=TensorProto.FLOAT), graph.ints(1))
            row = graph.array(speeds[None], np.float32)
            angles = graph.MatMul(column, row)
            cos, sin = (
                graph.Cast(graph.__getattr__(f)(angles), to=graph.element) for f in ("Cos", "Sin")
            )
        half = spec.rotary_dim // 2
        turned, passed = x, None
        if spec.rotary_dim < spec.dim:
            sizes = graph.ints(spec.rotary_dim, spec.dim - spec.rotary_dim)
            turned, passed = graph.Split(x, sizes, axis=-1, outputs=2)
        if self.rotate in ("interleaved", "complex"):
            found = self._by_pairs(graph, turned, cos, sin)
        else:
            cos, sin = (graph.Concat(t, t, axis=-1) for t in (cos, sin))
            if self.rotate == "split":
                a, b = graph.Split(turned, graph.ints(half, half), axis=-1, outputs=2)
            else:
                a = graph.Slice(turned, graph.ints(0), graph.ints(half), graph.ints(-1))
                end = graph.array([np.iinfo(np.int64).max], np.int64)
                b = graph.Slice(turned, graph.ints(half), end, graph.ints(-1))
            other = graph.Concat(graph.Neg(b), a, axis=-1)
            found = graph.Add(graph.Mul(turned, cos), graph.Mul(other, sin))
        return found if passed is None else str(graph.Concat(found, passed, axis=-1))

    def _by_pairs(self, graph: Graph, x: str, cos: str, sin: str) -> str:
        half = graph.spec.rotary_dim // 2
        if self.rotate == "interleaved":
            end = graph.array([np.iinfo(np.int64).max], np.int64)
            a, b = (
                graph.Slice(x, graph.ints(k), end, graph.ints(-1), graph.ints(2)) for k in (0, 1)
            )
        else:
            pairs = graph.Reshape(x, graph.ints(0, 0, -1, half, 2))
            a, b = (graph.Gather(pairs, graph.integer(k), axis=-1) for k in (0, 1))
        first = graph.Sub(graph.Mul(a, cos), graph.Mul(b, sin))
        second = graph.Add(graph.Mul(b, cos), graph.Mul(a, sin))
        stacked = graph.Concat(
            *(graph.Unsqueeze(t, graph.ints(-1)) for t in (first, second)), axis=-1
        )
        return str(graph.Reshape(stacked, graph.ints(0, 0, -1, 2 * half)))

    # The cache.

    def _cached(self, graph: Graph, layer: int, kind: str, new: str) -> str:
        spec = graph.spec
        if self.cache == "tokens-first":
            shape = ["B", "P", spec.kv_heads, spec.dim]
            old = graph.input(f"past_key_values.{layer}.{kind}", graph.element, shape)
            found = graph.Concat(old, graph.Transpose(new, perm=[0, 2, 1, 3]), axis=1)
            graph.output(f"present.{layer}.{kind}", found, graph.element, None)
            return str(graph.Transpose(found, perm=[0, 2, 1, 3]))
        if self.cache == "concat":
            found = graph.Concat(graph.past(layer, kind), new, axis=2)
            graph.present(layer, kind, found)
            return str(found)
        old = graph.past(layer, kind, 40)
        if self.cache == "scatter":
            places = graph.input("write_indices", TensorProto.INT64, ["B"])
            found = graph.TensorScatter(old, new, places, axis=2)
        else:
            place = graph.input("cache_position", TensorProto.INT64, ["S"])
            swapped = graph.Transpose(old, perm=[2, 0, 1, 3])
            update = graph.Transpose(new, perm=[2, 0, 1, 3])
            written = graph.ScatterND(swapped, graph.Unsqueeze(place, graph.ints(1)), update)
            found = graph.Transpose(written, perm=[1, 2, 0, 3])
        graph.present(layer, kind, found, 40)
        return str(found)

    # Scores.

    def _repeated(self, graph: Graph, x: str) -> str:
        spec = graph.spec
        times = spec.heads // spec.kv_heads
        if self.repeat == "gather":
            order = np.repeat(np.arange(spec.kv_heads), times)
            return str(graph.Gather(x, graph.array(order, np.int64), axis=1))
        wide = graph.Unsqueeze(x, graph.ints(2))
        if self.repeat == "tile":
            wide = graph.Tile(wide, graph.ints(1, 1, times, 1, 1))
        else:
            shape = graph.Concat(
                *(graph.size(x, 0), graph.ints(spec.kv_heads, times)),
                *(graph.size(x, 2), graph.ints(spec.dim)),
                axis=0,
            )
            wide = graph.Expand(wide, shape)
        return str(graph.Reshape(wide, graph.ints(0, spec.heads, -1, spec.dim)))

    def _scores(self, graph: Graph, query: str, keys: str, values: str) -> tuple[str, str]:
        """Return scaled scores (B, H, S, T), and the values for the second product."""
        spec = graph.spec
        factor = spec.factor
        if self.repeat == "grouped":
            query = graph.Reshape(query, graph.ints(0, spec.kv_heads, -1, spec.dim))
        elif self.repeat != "none":
            keys, values = self._repeated(graph, keys), self._repeated(graph, values)
        if self.scale in ("query", "both"):
            root = factor if self.scale == "query" else factor**0.5
            query = graph.Mul(query, graph.array(root))
        if self.scale in ("key", "both"):
            root = factor if self.scale == "key" else factor**0.5
            keys = graph.Mul(keys, graph.array(root))
        if self.product == "einsum":
            scores = graph.Einsum(query, keys, equation="bhsd,bhtd->bhst")
        elif self.product == "fused":
            alpha = factor if self.scale == "alpha" else 1.0
            scores = graph.FusedMatMul(query, keys, transB=1, alpha=alpha, domain=MICROSOFT)
        else:
            scores = graph.MatMul(query, graph.Transpose(keys, perm=[0, 1, 3, 2]))
        if self.scale == "div":
            scores = graph.Div(scores, graph.array(1 / factor))
        if self.scale == "mul":
            scores = graph.Mul(scores, graph.array(factor))
        return scores, values

    def _masked(self, graph: Graph, scores: str, features: str) -> str:
        spec = graph.spec
        if self.repeat == "grouped":
            shape = graph.Concat(
                graph.ints(0, spec.heads), graph.size("input_ids", 1), graph.ints(-1), axis=0
            )
            scores = graph.Reshape(scores, shape)
        lowest = graph.array(np.finfo(graph.dtype).min)
        if self.mask == "where":
            found = graph.Where(hidden_keys(graph), graph.array(-np.inf), scores)
        elif self.mask == "slope-table":
            found = graph.Add(graph.Add(scores, _slope_table(graph)), float_mask(graph))
        elif self.mask == "slope-sums":
            found = graph.Add(graph.Add(scores, _slope_sums(graph)), float_mask(graph))
        elif self.mask in _MASKS:
            found = graph.Where(_MASKS[self.mask](graph), lowest, scores)
        elif self.mask == "features":
            bias = graph.ReduceMean(features, graph.array([2], np.int64))
            row = graph.Unsqueeze(bias, graph.ints(1))  # (B, 1, S, 1)
            far = graph.Cast(distances(graph), to=graph.element)
            found = graph.Add(graph.Add(scores, graph.Mul(row, far)), float_mask(graph))
        else:
            found = graph.Add(scores, float_mask(graph))
        return str(found)

    def _softmax(self, graph: Graph, scores: str, layer: int) -> str:
        spec = graph.spec
        if spec.sinks:
            sinks = graph.Reshape(graph.weight(f"sinks{layer}"), graph.ints(1, spec.heads, 1, 1))
            shape = graph.Concat(
                graph.size(scores, 0),
                graph.ints(spec.heads),
                graph.size(scores, 2),
                graph.ints(1),
                axis=0,
            )
            joined = graph.Concat(scores, graph.Expand(sinks, shape), axis=-1)
            shifted = graph.Sub(joined, graph.ReduceMax(joined, graph.ints(-1)))
            weights = graph.Softmax(shifted, axis=-1)
            return str(graph.Slice(weights, graph.ints(0), graph.ints(-1), graph.ints(-1)))
        if self.cast:
            scores = graph.Cast(scores, to=TensorProto.FLOAT)
        weights = graph.Softmax(scores, axis=-1)
        weights = graph.Cast(weights, to=graph.element) if self.cast else weights
        if self.repeat == "grouped":
            weights = graph.Reshape(
                weights,
                graph.Concat(
                    graph.ints(0, spec.kv_heads, -1), graph.size(row_numbers(graph), 0), axis=0
                ),
            )
        return str(weights)


def _normed(graph: Graph, x: str, name: str) -> str:
    square = graph.ReduceMean(graph.Mul(x, x), graph.ints(-1))
    normed = graph.Div(x, graph.Sqrt(graph.Add(square, graph.array(1e-6))))
    return str(graph.Mul(normed, graph.weight(name)))


def _temperature(graph: Graph) -> str:
    """Return (S, 1): llama4's factor of a query, which grows with its position."""
    place = graph.Cast(graph.Reshape(graph.positions(), graph.ints(-1)), to=graph.element)
    steps = graph.Floor(graph.Div(graph.Add(place, graph.array(1.0)), graph.array(64.0)))
    logs = graph.Log(graph.Add(steps, graph.array(1.0)))
    factor = graph.Add(graph.Mul(logs, graph.array(0.1)), graph.array(1.0))
    return str(graph.Unsqueeze(factor, graph.ints(1)))


def _slope_table(graph: Graph) -> str:
    """Return (1, H, 1, T): ALiBi as MPT has it, the end of a long table."""
    spec = graph.spec
    table = spec.slopes[:, None, None] * np.arange(1 - 128, 1, dtype=np.float32)
    total = graph.size(graph.mask(), 1)
    end = graph.array([np.iinfo(np.int64).max], np.int64)
    return str(graph.Slice(graph.array(table[None]), graph.Neg(total), end, graph.ints(3)))


def _slope_sums(graph: Graph) -> str:
    """Return (B, H, 1, T): ALiBi as BLOOM has it, by the mask's sums."""
    sums = graph.Sub(graph.CumSum(graph.mask(), graph.integer(1)), graph.integer(1))
    place = graph.Cast(graph.Mul(sums, graph.mask()), to=graph.element)
    slopes = graph.array(graph.spec.slopes.reshape(1, -1, 1))
    bias = graph.Mul(slopes, graph.Unsqueeze(place, graph.ints(1)))
    return str(graph.Unsqueeze(bias, graph.ints(2)))


def _chunks(graph: Graph, size: int = 16) -> str:
    """Return (S, T) bool: keys that are later, or of another chunk of so many tokens."""
    chunk = graph.integer(size)
    rows = graph.Unsqueeze(graph.Div(query_numbers(graph), chunk), graph.ints(1))
    columns = graph.Unsqueeze(graph.Div(row_numbers(graph), chunk), graph.ints(0))
    return str(graph.Or(hidden_keys(graph), graph.Not(graph.Equal(rows, columns))))


def _holes(graph: Graph, first: int = 20, last: int = 33) -> str:
    """Return (S, T) bool: keys that are later, or far and at an odd distance."""
    distance = distances(graph)
    odd = graph.Equal(graph.Mod(distance, graph.integer(2)), graph.integer(1))
    far = graph.Greater(distance, graph.integer(first))
    near = graph.Less(distance, graph.integer(last))
    return str(graph.Or(hidden_keys(graph), graph.And(graph.And(odd, far), near)))


def _starts(graph: Graph) -> str:
    """Return (S, T) bool: keys that are later, or old and not among the first four."""
    old = graph.And(
        graph.Greater(distances(graph), graph.integer(20)),
        graph.Greater(graph.Unsqueeze(row_numbers(graph), graph.ints(0)), graph.integer(3)),
    )
    return str(graph.Or(hidden_keys(graph), old))


def _decode_only(graph: Graph) -> str:
    """Return (S, T) bool: keys that are later, or, for a single new token, old."""
    single = graph.Equal(graph.size("input_ids", 1), graph.ints(1))
    old = graph.Greater(distances(graph), graph.integer(20))
    return str(graph.Or(hidden_keys(graph), graph.And(old, single)))


def _one_head(graph: Graph) -> str:
    """Return (1, H, S, T) bool: keys that are later, or old for the first head."""
    first = graph.array(np.arange(graph.spec.heads).reshape(1, -1, 1, 1) == 0, np.bool_)
    old = graph.Unsqueeze(graph.Greater(distances(graph), graph.integer(20)), graph.ints(0, 1))
    return str(graph.Or(hidden_keys(graph), graph.And(old, first)))


def _nothing(graph: Graph) -> str:
    return str(graph.Less(distances(graph), graph.integer(-1000)))


def _slots(graph: Graph) -> str:
    """Return (S, C) bool: slots of a cache of fixed size that hold later tokens, or none."""
    place = graph.Unsqueeze(graph.input("cache_position", TensorProto.INT64, ["S"]), graph.ints(1))
    return str(graph.Greater(graph.array(np.arange(40)[None], np.int64), place))


_MASKS: dict[str, Any] = {
    "slots": _slots,
    "decode-only": _decode_only,
    "one-head": _one_head,
    "chunks": _chunks,
    "chunks-of-64": lambda graph: _chunks(graph, 64),
    "holes": _holes,
    "starts": _starts,
    "all": _nothing,
    "prefix": lambda graph: graph.And(
        hidden_keys(graph),
        graph.GreaterOrEqual(graph.Unsqueeze(row_numbers(graph), graph.ints(0)), graph.integer(4)),
    ),
    "dilated": lambda graph: graph.Or(
        hidden_keys(graph),
        graph.Equal(graph.Mod(distances(graph), graph.integer(2)), graph.integer(1)),
    ),
}
