"""Where a graph attends: nodes of fused attention, and softmaxes between two products.

Only the place is read from the graph's structure. What an attention computes is measured
(`measure.py`), so one description serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.errors import ModelError, shortened
from lminf_export.rewriting.feeds import Inputs
from lminf_export.rewriting.parts import nodes_between, read_values
from lminf_export.rewriting.places import SIZES, Places, origin

MICROSOFT = "com.microsoft"
_PRODUCTS = {("", "MatMul"), (MICROSOFT, "FusedMatMul"), ("", "Einsum"), ("", "Gemm")}
_UNDERSTOOD = (
    "expected GroupQueryAttention, MultiHeadAttention, Attention, or a product, softmax and product"
)


@dataclass(frozen=True)
class Anchor:
    """One attention of a graph.

    Attributes:
        kind: the operator's name, or "MatMul, Softmax, MatMul".
        node: for messages.
        query: (…) the new tokens' queries before any rotation, in whatever layout.
        key: the new tokens' keys, as query.
        value: the new tokens' values, as query.
        past_key: the graph's input with earlier keys.
        past_value: as past_key.
        keys: (B, G, P + S, D) all keys as they are cached.
        output: what the new tokens attend to.
    """

    kind: str
    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    keys: ir.Value
    output: ir.Value

    @property
    def name(self) -> str:
        """The node's name in messages."""
        return node_name(self.node)


def node_name(node: ir.Node) -> str:
    """Return how messages call a node."""
    return shortened(f"{node.op_type} {node.name or node.outputs[0].name}", 90)


def find_anchors(graph: ir.Graph, inputs: Inputs) -> list[Anchor]:
    """Return a graph's attentions in order.

    Raises:
        ModelError: naming one that is not understood, or that there is none.
    """
    places = Places(graph, inputs.positional)
    features = _features(graph, inputs)
    found: list[Anchor] = []
    ends: set[ir.Value] = set()
    for node in graph:
        decided = places.visit(node)
        if decided and ends.intersection(node.outputs):
            places.clear(node.outputs)
            continue
        finder = _FINDERS.get((node.domain, node.op_type))
        if finder is None or not decided:
            continue
        anchor = finder(_Search(graph, inputs, places, features), node)
        found.append(anchor)
        ends.add(anchor.output)
        places.clear([anchor.output])
    if not found:
        raise ModelError(f"the graph attends nowhere: {_UNDERSTOOD}, over a cache")
    return found


def _features(graph: ir.Graph, inputs: Inputs) -> set[ir.Value]:
    """Return all values that are computed from the tokens themselves, not from their number."""
    found = {inputs.ids}
    for node in graph:
        if node.op_type not in SIZES and any(v in found for v in read_values(node)):
            found.update(node.outputs)
    return found - {inputs.ids}


@dataclass(frozen=True)
class _Search:
    """The things that finders need."""

    graph: ir.Graph
    inputs: Inputs
    places: Places
    features: set[ir.Value]

    def anchor(
        self,
        kind: str,
        node: ir.Node,
        operands: tuple[ir.Value, ir.Value, ir.Value],
        output: ir.Value,
        *,
        pasts: tuple[ir.Value, ir.Value] | None = None,
        keys: ir.Value | None = None,
    ) -> Anchor:
        """Trace what attention takes to the tensors of the new tokens and to the caches."""
        _, key, value = operands
        name = node_name(node)
        past_key, past_value = pasts or (
            self._cache_of(key, f"the keys of {name}"),
            self._cache_of(value, f"the values of {name}"),
        )
        names = ("queries", "keys", "values")
        origins = [
            origin(self.places, operand, f"the {what} of {name}", self.features)
            for operand, what in zip(operands, names, strict=True)
        ]
        return Anchor(
            kind=kind,
            node=node,
            query=origins[0],
            key=origins[1],
            value=origins[2],
            past_key=past_key,
            past_value=past_value,
            keys=keys or _reader_in(key, past_key),
            output=output,
        )

    def _cache_of(self, value: ir.Value, what: str) -> ir.Value:
        caches = set(self.inputs.caches)
        read = {v for node in nodes_between([], [value]) for v in read_values(node)}
        found = _nearest(value, caches, self.places)
        if len(found) != 1 or not found <= read:
            raise ModelError(f"{what} come from {len(found)} caches of the graph's inputs, not one")
        return found.pop()

    def cache_input(self, value: ir.Value | None, what: str, node: ir.Node) -> ir.Value:
        """Check that a node's cache is an input of the graph."""
        if value is None or value not in self.inputs.roles:
            found = "none" if value is None else shortened(repr(value.name), 40)
            raise ModelError(
                f"{node_name(node)} takes no {what} from the graph's inputs (found {found}): "
                f"export the model with a cache (with-past, use_cache)"
            )
        return value


def _nearest(value: ir.Value, caches: set[ir.Value], places: Places) -> set[ir.Value]:
    """Return the caches that a value is made of, other attentions left out."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if current in seen or (places.free(current) and current not in caches):
            continue
        seen.add(current)
        if current in caches:
            found.add(current)
            continue
        node = current.producer()
        if node is not None and node.op_type not in SIZES:
            open_values += list(read_values(node))
    return found


def _reader_in(value: ir.Value, past: ir.Value) -> ir.Value:
    """Return what the one node that reads a cache on the way to a value makes of it."""
    for node in nodes_between([past], [value]):
        if past in node.inputs and node.op_type not in SIZES:
            return node.outputs[0]
    raise AssertionError("the cache is read on the way")


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


def _group_query(search: _Search, node: ir.Node) -> Anchor:
    values = _inputs(node, 17)
    if values[12] is not None or node.attributes.get_int("kv_cache_bit_width"):
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
        keys=node.outputs[1],
    )


def _multi_head(search: _Search, node: ir.Node) -> Anchor:
    values = _inputs(node, 10)
    kind = f"{MICROSOFT}::{node.op_type}"
    operands = _operands(node, values[:3])
    if values[6] is None:
        return search.anchor(kind, node, operands, node.outputs[0])
    pasts = (
        search.cache_input(values[6], "past keys", node),
        search.cache_input(values[7], "past values", node),
    )
    return search.anchor(kind, node, operands, node.outputs[0], pasts=pasts, keys=node.outputs[1])


def _attention(search: _Search, node: ir.Node) -> Anchor:
    values = _inputs(node, 7)
    operands = _operands(node, values[:3])
    kind = "ai.onnx::Attention"
    if values[4] is None:
        return search.anchor(kind, node, operands, node.outputs[0])
    pasts = (
        search.cache_input(values[4], "past keys", node),
        search.cache_input(values[5], "past values", node),
    )
    return search.anchor(kind, node, operands, node.outputs[0], pasts=pasts, keys=node.outputs[1])


def _softmax(search: _Search, node: ir.Node) -> Anchor:
    scores = _product_above(search, node)
    end, value = _product_below(search, node)
    sides = [v for v in scores.inputs[:2] if v is not None]
    with_cache = [bool(_nearest(v, set(search.inputs.caches), search.places)) for v in sides]
    if with_cache == [True, False]:
        sides.reverse()
    elif with_cache != [False, True]:
        raise ModelError(
            f"{node_name(scores)} multiplies no queries by cached keys, before {node_name(node)}: "
            f"{_UNDERSTOOD}"
        )
    query, key = sides
    return search.anchor("MatMul, Softmax, MatMul", node, (query, key, value), end.outputs[0])


def _product_above(search: _Search, node: ir.Node) -> ir.Node:
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


def _product_below(search: _Search, node: ir.Node) -> tuple[ir.Node, ir.Value]:
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
    raise ModelError(f"no product with values follows {node_name(node)}: {_UNDERSTOOD}")


_FINDERS: dict[tuple[str, str], Callable[[_Search, ir.Node], Anchor]] = {
    (MICROSOFT, "GroupQueryAttention"): _group_query,
    (MICROSOFT, "MultiHeadAttention"): _multi_head,
    ("", "Attention"): _attention,
    ("", "Softmax"): _softmax,
}


def fused_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes of fused attention."""
    for node in graph:
        if (node.domain, node.op_type) in _FINDERS and node.op_type != "Softmax":
            yield node
