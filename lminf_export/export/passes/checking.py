"""How passes check their contracts.

`onnx_ir` runs a pass as requires, call, ensures. What fails in the first or the last is a bug of
this package and raises an internal error; what a user can cause is raised by `call` as an
`LminfError`. Checks read names, shapes, types and small constants, never the data of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir
from onnx_ir.passes import PostconditionError, PreconditionError


def require(holds: object, text: str) -> None:
    """Raise PreconditionError unless something holds."""
    if not holds:
        raise PreconditionError(text)


def ensure(holds: object, text: str) -> None:
    """Raise PostconditionError unless something holds."""
    if not holds:
        raise PostconditionError(text)


def ensure_sound(model: ir.Model) -> None:
    """Ensure that nodes read only what stands before them, and that every output is made."""
    graph = model.graph
    known = {*graph.inputs, *graph.initializers.values()}
    for value in _unknown(graph, known):
        raise PostconditionError(f"{value.name} is read before it is made")
    for value in graph.outputs:
        ensure(value in known, f"nothing makes the output {value.name}")


def _unknown(nodes: Iterable[ir.Node], known: set[ir.Value]) -> Iterator[ir.Value]:
    """Yield what nodes, and the graphs within them, read that is not known by then."""
    for node in nodes:
        yield from (value for value in node.inputs if value is not None and value not in known)
        for graph in inner_graphs(node):
            inner = {*known, *graph.inputs, *graph.initializers.values()}
            yield from _unknown(graph, inner)
            yield from (value for value in graph.outputs if value not in inner)
        known.update(node.outputs)


def inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs within a node: the body of a loop, the branches of an If."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
