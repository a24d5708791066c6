"""Every node is named after its first output: the name that a builder's messages give."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.export.passes.checking import ensure, require


class NameNodesPass(ir.passes.InPlacePass):
    """Name nodes after what they make.

    Requires: every node's first output has a name.
    Ensures: it is the node's.
    """

    def requires(self, model: ir.Model) -> None:
        nameless = [node.op_type for node in model.graph if not node.outputs[0].name]
        require(not nameless, f"outputs without a name, of {nameless[:3]}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            node.name = node.outputs[0].name
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            ensure(node.name == node.outputs[0].name, f"{node.name} makes {node.outputs[0].name}")
