"""Names of nodes and of values within the graph are counted anew, in the graph's order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

_NUMBERS = re.compile(r"([._]+\d+)+$")


def number_names(model: ir.Model, kept: Collection[str]) -> None:
    """Name equal graphs equally, whatever passes and copies they came by.

    A value keeps the words of its name and gets a number, its place among those so called; so
    does an initializer that is not kept. A node is called after its operator.

    Args:
        model: changed in place.
        kept: names of initializers that stay.

    Ensures: names are unique, in the graphs within the graph too; inputs and outputs keep theirs.
    """
    graph = model.graph
    taken = {*kept, *(str(value.name) for value in (*graph.inputs, *graph.outputs))}
    values, nodes = _Names(taken), _Names(set())
    # All go before any comes back: a new name may be another's old one.
    own = [graph.initializers.pop(name) for name in [*graph.initializers] if name not in kept]
    for value in own:
        tensor, value.const_value = value.const_value, None
        value.name = values.next(str(value.name))
        if tensor is not None:  # others may hold the same, and it is written by its own name
            value.const_value = ir.tensor(tensor.numpy(), tensor.dtype, name=value.name)
        graph.initializers[value.name] = value
    outputs = set(graph.outputs)
    for node in RecursiveGraphIterator(graph):
        node.name = nodes.next(node.op_type)
        for value in node.outputs:
            if value.name and value not in outputs:
                value.name = values.next(value.name)


class _Names:
    """Hands out names that nobody has."""

    def __init__(self, taken: set[str]) -> None:
        self.taken, self.counts = taken, Counter[str]()

    def next(self, name: str) -> str:
        """Return the words of a name with a number."""
        words = _NUMBERS.sub("", name)
        while True:
            numbered = f"{words}_{self.counts[words]}"
            self.counts[words] += 1
            if numbered not in self.taken:
                return numbered
