"""Attention of foreign graphs in one node: onnxruntime's operators and the standard's."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from tests.support.foreign_decoders import MICROSOFT, Attend, Graph


def tables(graph: Graph) -> tuple[str, str]:
    """Return tables of cos and sin (rows, R/2)."""
    angles = graph.spec.angles()
    return graph.array(np.cos(angles)), graph.array(np.sin(angles))


def row_numbers(graph: Graph) -> str:
    """Return (T,) int64 numbers of all tokens, from the mask's length."""
    total = graph.Squeeze(graph.size(graph.mask(), 1))
    return str(graph.Range(graph.integer(0), total, graph.integer(1)))


def query_numbers(graph: Graph) -> str:
    """Return (S,) int64 numbers of the new tokens, by the lengths of mask and step."""
    total, new = graph.size(graph.mask(), 1), graph.size("input_ids", 1)
    limits = [graph.Squeeze(x) for x in (graph.Sub(total, new), total)]
    return str(graph.Range(*limits, graph.integer(1)))


def distances(graph: Graph) -> str:
    """Return (S, T) int64: how far keys are behind queries, negative ahead."""
    rows = graph.Unsqueeze(query_numbers(graph), graph.ints(1))
    return str(graph.Sub(rows, graph.Unsqueeze(row_numbers(graph), graph.ints(0))))


def hidden_keys(graph: Graph, window: int | None = None) -> str:
    """Return (S, T) bool: what a query does not see."""
    distance = distances(graph)
    later = graph.Less(distance, graph.integer(0))
    window = graph.spec.window if window is None else window
    if window is None:
        return str(later)
    return str(graph.Or(later, graph.GreaterOrEqual(distance, graph.integer(window))))


def float_mask(graph: Graph, window: int | None = None) -> str:
    """Return (1, 1, S, T): 0 for what a query sees, else the lowest number."""
    lowest = graph.array(np.finfo(graph.dtype).min)
    hidden = hidden_keys(graph, window)
    return str(graph.Unsqueeze(graph.Where(hidden, lowest, graph.array(0.0)), graph.ints(0, 1)))


def slopes_bias(graph: Graph) -> str:
    """Return (1, H, S, T): ALiBi's bias and the causal mask."""
    slopes = graph.array(-graph.spec.slopes.reshape(1, -1, 1, 1))
    bias = graph.Mul(slopes, graph.Cast(distances(graph), to=graph.element))
    return str(graph.Add(bias, float_mask(graph)))


def rotated(graph: Graph, x: str, heads: int, kind: str) -> str:
    """Return x (B, S, heads·D) rotated by a node RotaryEmbedding."""
    spec = graph.spec
    cos, sin = tables(graph)
    partial = 0 if spec.rotary_dim == spec.dim else spec.rotary_dim
    if kind == MICROSOFT:
        partly: dict[str, Any] = {"rotary_embedding_dim": partial} if partial else {}
        return str(
            graph.RotaryEmbedding(
                x,
                graph.positions(),
                cos,
                sin,
                domain=MICROSOFT,
                num_heads=heads,
                interleaved=int(spec.interleaved),
                **partly,
            )
        )
    inputs = [x, cos, sin, graph.positions()]
    if kind == "gathered":
        inputs = [x, *(graph.Gather(table, graph.positions()) for table in (cos, sin))]
    return str(
        graph.RotaryEmbedding(
            *inputs,
            num_heads=heads,
            interleaved=int(spec.interleaved),
            rotary_embedding_dim=partial,
        )
    )


def total_lengths(graph: Graph, kind: str) -> tuple[str, str]:
    """Return GroupQueryAttention's seqlens_k and total_sequence_length."""
    if kind == "inputs":
        return (
            graph.input("past_seq_len", TensorProto.INT32, ["B", 1]),
            graph.input("total_seq_len", TensorProto.INT32, [1]),
        )
    total = graph.Cast(graph.Gather(graph.Shape(graph.mask()), graph.integer(1)), to=6)
    summed = graph.ReduceSum(graph.mask(), graph.ints(1), keepdims=0)
    return graph.Cast(graph.Sub(summed, graph.integer(1)), to=6), total


def group_query(
    *,
    packed: bool = False,
    rotary: str = "inside",
    lengths: str = "mask",
    position_ids: bool = False,
    **attributes: Any,
) -> Attend:
    """com.microsoft::GroupQueryAttention."""

    def attend(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        spec = graph.spec
        if rotary == "before":
            query = rotated(graph, query, spec.heads, MICROSOFT)
            key = rotated(graph, key, spec.kv_heads, MICROSOFT)
        inputs = [query, key, value]
        if packed:
            inputs = [graph.Concat(*inputs, axis=-1), "", ""]
        inside = rotary == "inside" and spec.rotary_dim
        inputs += [graph.past(layer, "key"), graph.past(layer, "value")]
        inputs += total_lengths(graph, lengths)
        inputs += tables(graph) if inside else ("", "")
        inputs.append(graph.positions() if position_ids else "")
        inputs.append(slopes_bias(graph) if spec.alibi else "")
        inputs.append(graph.weight(f"sinks{layer}") if spec.sinks == "learned" else "")
        if spec.qk_norm:
            inputs += ["", "", graph.weight(f"q_norm{layer}"), graph.weight(f"k_norm{layer}")]
        output, *present = graph.GroupQueryAttention(
            *inputs,
            outputs=3,
            domain=MICROSOFT,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            do_rotary=int(bool(inside)),
            rotary_interleaved=int(spec.interleaved),
            softcap=spec.softcap,
            smooth_softmax=int(spec.sinks == "zero"),
            **{"scale": spec.factor} if spec.scale is not None else {},
            **{"local_window_size": spec.window} if spec.window is not None else {},
            **attributes,
        )
        for kind, tensor in zip(("key", "value"), present, strict=True):
            graph.present(layer, kind, tensor)
        return str(output)

    return attend


def multi_head(
    *, form: str = "separate", mask: str = "bias", rotary: bool = True, past: str = "inside"
) -> Attend:
    """com.microsoft::MultiHeadAttention."""

    def attend(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        spec = graph.spec
        if rotary and spec.rotary_dim:
            query, key = (rotated(graph, x, spec.heads, MICROSOFT) for x in (query, key))
        pasts = [graph.past(layer, "key"), graph.past(layer, "value")]
        if past == "outside":
            key, value = (graph.heads(x, spec.heads) for x in (key, value))
            key, value = (
                graph.Concat(old, new, axis=2) for old, new in zip(pasts, (key, value), strict=True)
            )
            for kind, tensor in (("key", key), ("value", value)):
                graph.present(layer, kind, tensor)
            if form == "flat":
                key, value = graph.flat(key), graph.flat(value)
            pasts = ["", ""]
        if form in ("packed", "packed_kv"):
            parts = [query, key, value] if form == "packed" else [key, value]
            shaped = [graph.Reshape(x, graph.ints(0, 0, spec.heads, 1, spec.dim)) for x in parts]
            stacked = graph.Concat(*shaped, axis=3)
            query, key, value = (stacked, "", "") if form == "packed" else (query, stacked, "")
        bias = ""
        if spec.bias:
            parts = [spec.weights[f"{name}_bias{layer}"] for name in "qkv"]
            bias = graph.array(np.concatenate(parts))
        attention_bias = ""
        if mask == "bias":
            attention_bias = slopes_bias(graph) if spec.alibi else float_mask(graph)
        padding = graph.Cast(graph.mask(), to=6) if mask == "padding" else ""
        found = graph.MultiHeadAttention(
            *(query, key, value, bias, padding, attention_bias, *pasts),
            outputs=1 if past == "outside" else 3,
            domain=MICROSOFT,
            num_heads=spec.heads,
            unidirectional=int(mask in ("none", "padding")),
            **{"scale": spec.factor} if spec.scale is not None else {},
        )
        if past == "outside":
            return str(found)
        for kind, tensor in zip(("key", "value"), found[1:], strict=True):
            graph.present(layer, kind, tensor)
        return str(found[0])

    attend.takes_bias = True  # type: ignore[attr-defined]
    return attend


def packed_weights(*, past: bool = True, **attributes: Any) -> Attend:
    """com.microsoft::Attention, whose node holds the products of queries, keys and values."""

    def attend(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        spec = graph.spec
        source = graph.nodes[-1].input[0] if not spec.bias else graph.nodes[-2].input[0]
        names = [f"{name}{layer}" for name in "qkv"]
        weights = graph.array(np.concatenate([spec.weights[n] for n in names], 1))
        bias = graph.array(np.concatenate([spec.weights[f"{n[0]}_bias{layer}"] for n in names]))
        shape = [2, "B", spec.heads, "P", spec.dim]
        cache = graph.input(f"past_key_values.{layer}", graph.element, shape) if past else ""
        output, present = graph.Attention(
            *(source, weights, bias if spec.bias else "", "", cache),
            outputs=2,
            domain=MICROSOFT,
            num_heads=spec.heads,
            unidirectional=1,
            do_rotary=int(bool(spec.rotary_dim)),
            **{"scale": spec.factor} if spec.scale is not None else {},
            **attributes,
        )
        shape[3] = "T"
        graph.output(f"present.{layer}", present, graph.element, shape)
        return str(output)

    attend.takes_bias = True  # type: ignore[attr-defined]
    return attend


def standard(
    *,
    rank: int = 3,
    mask: str = "float",
    rotary: str = "rows",
    cache: str = "inside",
    slots: Any = "P",
    **attributes: Any,
) -> Attend:
    """The standard's Attention."""

    def attend(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        spec = graph.spec
        if spec.rotary_dim:
            query = rotated(graph, query, spec.heads, rotary)
            key = rotated(graph, key, spec.kv_heads, rotary)
        groups = spec.kv_heads
        counts: dict[str, Any] = {"q_num_heads": spec.heads, "kv_num_heads": groups}
        pasts = [graph.past(layer, kind, slots) for kind in ("key", "value")]
        if rank == 4 or cache != "inside":
            counts = {}
            query = graph.heads(query, spec.heads)
            key, value = graph.heads(key, groups), graph.heads(value, groups)
        lengths = ""
        if cache == "scatter":
            places = graph.input("write_indices", TensorProto.INT64, ["B"])
            key, value = (
                graph.TensorScatter(old, new, places, axis=2)
                for old, new in zip(pasts, (key, value), strict=True)
            )
            lengths = graph.input("nonpad_kv_seqlen", TensorProto.INT64, ["B"])
        if cache == "concat":
            key, value = (
                graph.Concat(old, new, axis=2) for old, new in zip(pasts, (key, value), strict=True)
            )
        nothing = dict.fromkeys(("none", "everything"), lambda _: "")
        masks = {"float": float_mask, "slots": _slots_mask, **nothing}
        seen = "" if mask == "bool" else masks[mask](graph)
        if mask == "bool":
            seen = graph.Unsqueeze(graph.Not(hidden_keys(graph)), graph.ints(0, 1))
        inside = cache == "inside"
        names = ("key", "value")
        inputs = [query, key, value, seen, *(pasts if inside else ("", "")), lengths]
        while not inputs[-1]:
            inputs.pop()
        found = graph.Attention(
            *inputs,
            outputs=3 if inside else 1,
            is_causal=int(mask == "none"),
            softcap=spec.softcap,
            **{"scale": spec.factor} if spec.scale is not None else {},
            **counts,
            **attributes,
        )
        present = found[1:] if inside else (key, value)
        output = found[0] if inside else found
        for kind, tensor in zip(names, present, strict=True):
            graph.present(layer, kind, tensor, "T" if cache != "scatter" else slots)
        return str(graph.flat(output) if not counts else output)

    return attend


def _slots_mask(graph: Graph) -> str:
    """Return (1, 1, S, C) bool: the slots of a cache of fixed size that a query sees."""
    start = graph.input("write_indices", TensorProto.INT64, ["B"])
    slots = graph.size(graph.past(0, "key"), 2)
    new = graph.Squeeze(graph.size("input_ids", 1))
    numbers = graph.Range(graph.integer(0), new, graph.integer(1))
    rows = graph.Unsqueeze(graph.Add(numbers, start), graph.ints(1))
    columns = graph.Range(graph.integer(0), graph.Squeeze(slots), graph.integer(1))
    seen = graph.LessOrEqual(graph.Unsqueeze(columns, graph.ints(0)), rows)
    return str(graph.Unsqueeze(seen, graph.ints(0, 1)))
