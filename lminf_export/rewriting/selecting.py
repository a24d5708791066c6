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
from lminf_export.rewriting.searching import MICROSOFT, node_name
from lminf_export.rewriting.towards import others_are_fed, way_up

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
    place = _selection(found) if not _tokens(found, logits) else _before_head(found)
    op = Recorder()
    at = op.Unsqueeze(index, op.integers(2))
    graph = found.model.graph
    if place is None or not place.readers:
        source = logits if place is None else place.source
        rows: ir.Value = op.GatherND(source, at, batch_dims=1)
        graph.extend(op.nodes)
        return rows
    rows = op.GatherND(place.source, at, batch_dims=1)
    graph.insert_before(place.readers[0].node, op.nodes)
    for use in place.readers:
        use.node.replace_input_with(use.idx, rows)
    return logits


@dataclass(frozen=True)
class _Place:
    """Where rows are chosen.

    Attributes:
        source: (B, S, features).
        readers: of what the graph picks there, which read the chosen rows instead; empty where that
            is the output itself.
    """

    source: ir.Value
    readers: Sequence[Any]


def _tokens(found: FoundGraph, value: ir.Value | None) -> bool:
    """Say whether a value has shape (B, S, features)."""
    return value is not None and value in found.shapes and are_of_tokens(found.shapes[value])


def _before_head(found: FoundGraph) -> _Place | None:
    """Return what the head multiplies, if only what treats tokens alone follows it.

    None where something else that depends on the tokens joins behind the product, or in it: then
    rows are chosen at the end.
    """
    behind: list[tuple[ir.Node, ir.Value]] = []
    for node, above in way_up(found.logits):
        kind = (node.domain, node.op_type)
        if kind in _INTEGER_PRODUCTS or (not node.domain and node.op_type in _TOKENWISE):
            behind.append((node, above))
            continue
        if kind not in _PRODUCTS or above is not node.inputs[0] or not _tokens(found, above):
            return None
        joined = [others_are_fed(*step, node.outputs) for step in behind]
        if any(joined) or others_are_fed(node, above):
            return None
        readers = [use for use in above.uses() if use.node is node]
        return _Place(_all_rows(found, above), readers)
    return None


def _all_rows(found: FoundGraph, value: ir.Value) -> ir.Value:
    """Return what a graph picks its last rows from, as many as an input asks for (here all)."""
    node = value.producer()
    data = node.inputs[0] if node is not None and node.op_type in _PICKS else None
    same = data is not None and found.shapes.get(data) == found.shapes[value]
    return data if same and data is not None else value


def _selection(found: FoundGraph) -> _Place:
    """Return what a graph picks its last row from, and who reads that row.

    Raises:
        ModelError: no such place is found, or there are several.
    """
    row = found.logits
    behind: list[tuple[ir.Node, ir.Value]] = []
    for node, above in way_up(found.logits):
        value, data = node.outputs[0], node.inputs[0] if node.inputs else None
        if value in found.shapes and found.shapes[value][0][:-1] == (1, 1):
            row = value
        if node.op_type in _PICKS and data is not None and _tokens(found, data):
            if any(others_are_fed(*step, (row,)) for step in behind):
                raise ModelError(
                    f"{node_name(node)} picks rows for the logits, but not all that the logits "
                    f"depend on; expected one place that picks them"
                )
            return _Place(data, list(row.uses()))
        behind.append((node, above))
    raise ModelError(
        f"the logits have shape {found.shapes[found.logits][0]} for 5 tokens, and no node is found "
        f"that picks rows before them; expected (batch, tokens, vocabulary)"
    )
