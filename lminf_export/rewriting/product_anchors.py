"""Attentions of a graph that are written out: a softmax between two products."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.errors import ModelError
from lminf_export.rewriting.parts import read_values
from lminf_export.rewriting.searching import (
    MICROSOFT,
    UNDERSTOOD,
    Anchor,
    Search,
    nearest,
    node_name,
)

_PRODUCTS = {("", "MatMul"), (MICROSOFT, "FusedMatMul"), ("", "Einsum"), ("", "Gemm")}


def softmax(search: Search, node: ir.Node) -> Anchor:
    """Return the place of an attention around a softmax.

    Raises:
        ModelError: the softmax is not between a product of queries and keys and one with values.
    """
    scores = _product_above(search, node)
    end, value = product_below(node)
    sides = [v for v in scores.inputs[:2] if v is not None]
    with_cache = [bool(nearest(v, set(search.inputs.caches), search.places)) for v in sides]
    if with_cache == [True, False]:
        sides.reverse()
    elif with_cache != [False, True]:
        raise ModelError(
            f"{node_name(scores)} multiplies no queries by cached keys, before {node_name(node)}: "
            f"{UNDERSTOOD}"
        )
    query, key = sides
    return search.anchor("MatMul, Softmax, MatMul", node, (query, key, value), end.outputs[0])


def _product_above(search: Search, node: ir.Node) -> ir.Node:
    """Return the product whose result a softmax takes."""
    found: dict[ir.Node, None] = {}
    seen: set[ir.Value] = set()
    open_values = [node.inputs[0]]
    while open_values:
        current = open_values.pop()
        if current is None or current in seen or search.places.free(current):
            continue
        seen.add(current)
        made_by = current.producer()
        if made_by is None:
            continue
        if (
            (made_by.domain, made_by.op_type) in _PRODUCTS
            and not any(v is not None and v.const_value is not None for v in made_by.inputs[:2])
            and search.features.intersection(v for v in made_by.inputs if v is not None)
        ):
            found[made_by] = None
        else:
            open_values += list(read_values(made_by))
    if len(found) != 1:
        raise ModelError(f"{node_name(node)} comes behind {len(found)} products, not one")
    return next(iter(found))


def product_below(node: ir.Node) -> tuple[ir.Node, ir.Value]:
    """Return the product that takes a softmax's result, and the values it multiplies."""
    seen = {node.outputs[0]}
    open_values = [node.outputs[0]]
    while open_values:
        current = open_values.pop(0)
        for use, place in current.uses():
            if (use.domain, use.op_type) in _PRODUCTS:
                other = use.inputs[1 - place]
                if other is not None and place < 2:
                    return use, other
            for value in use.outputs:
                if value not in seen:
                    seen.add(value)
                    open_values.append(value)
    raise ModelError(f"no product with values follows {node_name(node)}: {UNDERSTOOD}")
