"""Logits of the rows that are asked for, and no others: the head is the largest product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from lminf_export.errors import ModelError
from lminf_export.rewriting.finding import FoundGraph
from lminf_export.rewriting.layouts import are_of_tokens
from lminf_export.rewriting.recording import Recorder
from lminf_export.rewriting.searching import MICROSOFT

_PRODUCTS = {
    *((MICROSOFT, kind) for kind in ("MatMulNBits", "FusedMatMul", "DynamicQuantizeMatMul")),
    *((MICROSOFT, kind) for kind in ("MatMulIntegerToFloat", "MatMulFpQ4", "MatMulBnb4")),
    ("", "MatMul"),
    ("", "DynamicQuantizeLinear"),
}
# Products of integers, whose tokens are rounded to integers by the node before.
_INTEGER_PRODUCTS = {("", "MatMulInteger"), (MICROSOFT, "MatMulIntegerToFloat")}
_PICKS = ("Gather", "Slice", "GatherND", "GatherElements")
# What treats every token and every feature by itself.
_TOKENWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Clip", "Where"}


def select_logits(found: FoundGraph, index: ir.Value, ids: ir.Value) -> ir.Value:
    """Let the head compute the rows that are asked for; return the logits (B, K, V).

    Args:
        found: the graph.
        index: (B, K) int64, rows of the new tokens.
        ids: (B, S) the tokens.
    """
    logits = found.logits
    place = _selection(found) or _before_head(found)
    op = Recorder()
    at = op.Unsqueeze(index, op.integers(2))
    graph = found.model.graph
    if place is None:
        rows: ir.Value = op.GatherND(logits, at, batch_dims=1)
        graph.extend(op.nodes)
        return rows
    rows = op.GatherND(place.source, at, batch_dims=1)
    graph.insert_before(place.readers[0].node, op.nodes)
    for use in place.readers:
        use.node.replace_input_with(use.idx, rows)
    return logits


@dataclass(frozen=True)
class _Place:
    """Where rows are chosen: a tensor (B, S, features), and what shall read its rows instead."""

    source: ir.Value
    readers: Sequence[Any]


def _way_up(found: FoundGraph) -> list[ir.Node]:
    """Return the nodes from the logits up to the head's product and beyond, as far as known."""
    nodes: list[ir.Node] = []
    value: ir.Value | None = found.logits
    while value is not None and value in found.shapes:
        node = value.producer()
        if node is None:
            break
        nodes.append(node)
        value = next((v for v in node.inputs if v is not None and v.const_value is None), None)
    return nodes


def _tokens(found: FoundGraph, value: ir.Value | None) -> bool:
    """Say whether a value has shape (B, S, features)."""
    return value is not None and value in found.shapes and are_of_tokens(found.shapes[value])


def _before_head(found: FoundGraph) -> _Place | None:
    """Return what the head multiplies, if only what treats tokens alone follows it."""
    if not _tokens(found, found.logits):
        return None
    for node in _way_up(found):
        data = node.inputs[0]
        if (node.domain, node.op_type) in _INTEGER_PRODUCTS:
            continue
        if (node.domain, node.op_type) in _PRODUCTS:
            if data is None or not _tokens(found, data):
                return None
            readers = [use for use in data.uses() if use.node is node]
            return _Place(_all_rows(found, data), readers)
        if node.domain or node.op_type not in _TOKENWISE:
            return None
    return None


def _all_rows(found: FoundGraph, value: ir.Value) -> ir.Value:
    """Return what a graph picks its last rows from, as many as an input asks for (here all)."""
    node = value.producer()
    data = node.inputs[0] if node is not None and node.op_type in _PICKS else None
    same = data is not None and found.shapes.get(data) == found.shapes[value]
    return data if same and data is not None else value


def _selection(found: FoundGraph) -> _Place | None:
    """Return what a graph picks its last row from, and who reads that row, if it does."""
    if _tokens(found, found.logits):
        return None
    row: ir.Value | None = None
    for node in _way_up(found):
        value, data = node.outputs[0], node.inputs[0] if node.inputs else None
        if value in found.shapes and found.shapes[value][0][:-1] == (1, 1):
            row = value
        if node.op_type in _PICKS and row is not None and data is not None and _tokens(found, data):
            return _Place(data, list(row.uses()))
    raise ModelError(
        f"the logits have shape {found.shapes[found.logits][0]} for 5 tokens, and no node is found "
        f"that picks rows before them; expected (batch, tokens, vocabulary)"
    )
