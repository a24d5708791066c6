"""Nodes written one after the other, as calls of their operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir


class Recorder:
    """Makes nodes: `recorder.Add(a, b)` returns the sum's value.

    Attributes of the operator are keyword arguments, `_outputs` the number of its results.

    Args:
        domain: of the operators.
        nodes: the list that new nodes are appended to; by default a new one.
    """

    def __init__(self, domain: str = "", nodes: list[ir.Node] | None = None) -> None:
        self.domain = domain
        self.nodes: list[ir.Node] = [] if nodes is None else nodes

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def record(*inputs: ir.Value | None, _outputs: int = 1, **attributes: Any) -> Any:
            node = ir.node(
                op_type, list(inputs), attributes, domain=self.domain, num_outputs=_outputs
            )
            self.nodes.append(node)
            return node.outputs[0] if _outputs == 1 else tuple(node.outputs)

        return record

    def of(self, domain: str) -> Recorder:
        """Return a recorder of another domain's operators into the same list."""
        return Recorder(domain, self.nodes)

    def integers(self, *values: int) -> ir.Value:
        """Return a constant list of int64."""
        found: ir.Value = self.Constant(value_ints=values)
        return found
