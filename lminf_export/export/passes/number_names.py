"""Names of nodes and of values within the graph are counted anew, in the graph's order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from lminf_export.export.passes.checking import ensure, require

# Of a node, and behind "split" and the like of one of its results.
_NUMBERS = re.compile(r"[._]+\d+(?=[._]|$)")


@dataclass(frozen=True)
class NumberNamesPass(ir.passes.InPlacePass):
    """Name equal graphs equally, whatever passes and copies they came by.

    A value keeps the words of its name and gets a number, its place among those so called; so
    does an initializer that is not kept. A node is called after its operator.

    Requires: inputs, outputs and initializers have names, no two the same.
    Ensures: names are unique, in the graphs within the graph too; inputs and outputs keep theirs.

    Attributes:
        kept: names of initializers that stay, besides those whose data are in a file.
    """

    kept: Collection[str] = ()

    def requires(self, model: ir.Model) -> None:
        graph = model.graph
        ends = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
        names = {value.name for value in ends}
        require(None not in names, "an input, output or initializer has no name")
        require(len(names) == len(ends), "two inputs, outputs or initializers have one name")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        kept = self._kept(graph)
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
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for what, names in (("values", _value_names(model)), ("nodes", _node_names(model))):
            name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 1))
            ensure(count == 1, f"{count} {what} are called {name}")
        for key, value in model.graph.initializers.items():
            ensure(key == value.name, f"the initializer {key} is called {value.name}")
        for node in RecursiveGraphIterator(model.graph):
            named = node.name is not None and node.name.startswith(f"{node.op_type}_")
            ensure(named, f"the node {node.name} is not called after {node.op_type}")

    def _kept(self, graph: ir.Graph) -> set[str]:
        return {
            name
            for name, value in graph.initializers.items()
            if name in self.kept or isinstance(value.const_value, ir.ExternalTensor)
        }


def _value_names(model: ir.Model) -> Iterator[str | None]:
    graph = model.graph
    yield from (value.name for value in (*graph.inputs, *graph.initializers.values()))
    for node in RecursiveGraphIterator(graph):
        yield from (value.name for value in node.outputs if value.name)


def _node_names(model: ir.Model) -> Iterator[str | None]:
    yield from (node.name for node in RecursiveGraphIterator(model.graph))


class _Names:
    """Makes names that are not taken."""

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
