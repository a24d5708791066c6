"""Rings are written linearly, which is all that TensorRT's cache update knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.errors import EngineError
from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require
from lminf_export.operator import contract

_WRITE_OP = "TensorScatter"


@dataclass(frozen=True)
class WriteRingsLinearlyPass(ir.passes.InPlacePass):
    """Let TensorScatter write from its place on, and no longer around the ring's end.

    Values are the same for every step that does not cross a ring's end, and the runtime of such
    an engine splits chunks there.

    Requires: the operator's body is inlined.
    Ensures: every write is linear, and leads from a ring of the inputs to that of the outputs.

    Attributes:
        ring_updates: past name → present name of every ring.

    Raises:
        EngineError: the graph writes other rings.
    """

    ring_updates: Mapping[str, str]

    def requires(self, model: ir.Model) -> None:
        calls = [node.op_type for node in model.graph if node.domain == contract.DOMAIN]
        require(not calls, f"the graph still calls {calls[:1]}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in _writes(model.graph):
            node.attributes["mode"] = ir.AttrString("mode", "linear")
        writes = _ring_writes(model.graph)
        if writes != self.ring_updates:
            raise EngineError(
                f"the graph writes {len(writes)} rings from input to output, its layers "
                f"have {len(self.ring_updates)}; export the model again"
            )
        return ir.passes.PassResult(model, bool(writes))

    def ensures(self, model: ir.Model) -> None:
        for node in _writes(model.graph):
            mode = node.attributes.get_string("mode", "linear")
            ensure(mode == "linear", f"{node.outputs[0].name} is written in mode {mode}")
        ensure(_ring_writes(model.graph) == self.ring_updates, "other rings are written")


def _writes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if editing.is_op(node, _WRITE_OP))


def _ring_writes(graph: ir.Graph) -> dict[str | None, str | None]:
    """Return past name → present name of every write from an input to an output."""
    ends = [(node.inputs[0], node.outputs[0]) for node in _writes(graph)]
    return {
        past.name: present.name
        for past, present in ends
        if past is not None and past.is_graph_input() and present.is_graph_output()
    }
