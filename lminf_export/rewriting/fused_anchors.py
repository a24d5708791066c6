"""Attentions of a graph that are one node: onnxruntime's operators, and the standard's."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.errors import ModelError
from lminf_export.rewriting.searching import MICROSOFT, Anchor, Search, node_name


def _inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * max(0, count - len(node.inputs))]


def _operands(node: ir.Node, values: list[ir.Value | None]) -> tuple[ir.Value, ir.Value, ir.Value]:
    query, key, value = values
    if query is None or key is None or value is None:
        raise ModelError(
            f"{node_name(node)} is not understood: expected queries, keys and values as three "
            f"inputs"
        )
    return query, key, value


def group_query(search: Search, node: ir.Node) -> Anchor:
    """Return the place of a node GroupQueryAttention.

    Raises:
        ModelError: it has another form than those known.
    """
    values = _inputs(node, 17)
    kinds = {node.attributes.get_string(f"{x}_quant_type", "NONE") for x in "kv"}
    scales = [v for v in values[12:14] if v is not None]
    if scales or kinds != {"NONE"} or node.attributes.get_int("kv_cache_bit_width"):
        raise ModelError(
            f"{node_name(node)} has a quantised cache; rewriting takes caches of the model's own "
            f"element type: export the model without a quantised cache"
        )
    pasts = (
        search.cache_input(values[3], "past keys", node),
        search.cache_input(values[4], "past values", node),
    )
    return search.anchor(
        f"{MICROSOFT}::{node.op_type}",
        node,
        _operands(node, values[:3]),
        node.outputs[0],
        pasts=pasts,
        keys=_present(node),
    )


def multi_head(search: Search, node: ir.Node) -> Anchor:
    """Return the place of a node MultiHeadAttention; errors as above."""
    return _with_optional_pasts(search, node, f"{MICROSOFT}::{node.op_type}", 6)


def attention(search: Search, node: ir.Node) -> Anchor:
    """Return the place of the standard's Attention; errors as above."""
    return _with_optional_pasts(search, node, "ai.onnx::Attention", 4)


def _with_optional_pasts(search: Search, node: ir.Node, kind: str, past: int) -> Anchor:
    """Return the place of a node that takes caches from its input `past` on, or joined keys."""
    values = _inputs(node, past + 2)
    operands = _operands(node, values[:3])
    if values[past] is None:
        return search.anchor(kind, node, operands, node.outputs[0])
    pasts = (
        search.cache_input(values[past], "past keys", node),
        search.cache_input(values[past + 1], "past values", node),
    )
    return search.anchor(kind, node, operands, node.outputs[0], pasts=pasts, keys=_present(node))


def _present(node: ir.Node) -> ir.Value:
    """Return the cache that a node gives out."""
    if len(node.outputs) < 2:
        raise ModelError(
            f"{node_name(node)} takes earlier keys and gives none out; expected a cache as output"
        )
    return node.outputs[1]
