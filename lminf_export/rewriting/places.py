"""Which values of a graph depend on a token's place in the text, and where that begins.

Keys and queries carry no position until they are rotated. Going back from what attention takes,
the first tensors that no positional input decides are the queries, keys and values themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from lminf_export.errors import ModelError, shortened
from lminf_export.rewriting.parts import read_values

# Operators that only rearrange, or scale, the numbers of one tensor.
_REARRANGING = {
    *("Slice", "Split", "Concat", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Gather"),
    *("Neg", "Identity", "Cast", "Mul", "Div", "Expand", "Flatten"),
}
# Operators that read a tensor's shape only.
SIZES = ("Shape", "Size")


class Places:
    """Values that positional inputs decide, with attention found so far left out of account.

    Args:
        graph: whose values.
        positional: its inputs that say where tokens are.
    """

    def __init__(self, graph: ir.Graph, positional: Iterable[ir.Value]) -> None:
        self.graph = graph
        self.decided: set[ir.Value] = set(positional)

    def visit(self, node: ir.Node) -> bool:
        """Take the next node in the graph's order; say whether positions decide its results."""
        decided = any(value in self.decided for value in read_values(node))
        if decided:
            self.decided.update(node.outputs)
        return decided

    def clear(self, values: Iterable[ir.Value]) -> None:
        """Take attention's results: from here on they are tokens' features like others."""
        self.decided.difference_update(values)

    def free(self, value: ir.Value) -> bool:
        """Say whether no positional input decides a value."""
        return value not in self.decided


def origins(places: Places, value: ir.Value, what: str, floats: set[ir.Value]) -> list[ir.Value]:
    """Return the one free tensor of features that a value is made of, and what that was made of.

    Args:
        places: of the graph.
        value: what attention takes.
        what: in messages, such as "the queries of node X".
        floats: values known to hold features, which are not shapes or positions.

    Raises:
        ModelError: it is made of several.
    """
    sources = _free_sources(places, value, floats)
    if not sources:
        raise ModelError(f"{what} are not made of the tokens' features")
    common: list[ir.Value] | None = None
    for source in sources:
        chain = list(_ancestors(source, floats))
        common = chain if common is None else [v for v in common if v in set(chain)]
    if not common:
        names = ", ".join(shortened(repr(v.name), 40) for v in sources[:3])
        raise ModelError(f"{what} are put together of several tensors ({names})")
    return common


def _free_sources(places: Places, value: ir.Value, floats: set[ir.Value]) -> list[ir.Value]:
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    open_values = [value]
    while open_values:
        current = open_values.pop()
        if current in seen:
            continue
        seen.add(current)
        if places.free(current):
            if current in floats:
                found[current] = None
            continue
        node = current.producer()
        if node is not None and node.op_type not in SIZES:
            open_values += list(read_values(node))
    return list(found)


def _ancestors(value: ir.Value, floats: set[ir.Value]) -> Iterator[ir.Value]:
    """Yield a value and what it was rearranged from, nearest first."""
    seen: set[ir.Value] = set()
    level = [value]
    while level:
        following: list[ir.Value] = []
        for current in level:
            if current in seen:
                continue
            seen.add(current)
            yield current
            node = current.producer()
            if node is not None and node.op_type in _REARRANGING:
                following += [v for v in node.inputs if v is not None and v in floats]
        level = following
