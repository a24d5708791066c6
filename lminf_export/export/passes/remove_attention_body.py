"""The operator's body leaves the graph, so that nothing but a plugin can take its nodes."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.engine.plugin_node import OPERATORS
from lminf_export.export.passes.checking import ensure, require
from lminf_export.operator import contract


class RemoveAttentionBodyPass(ir.passes.InPlacePass):
    """Remove the attention operator's function.

    Whatever a release's parser prefers, it then finds the plugin or refuses the node.

    Requires: the graph calls no kind of this operator that the plugin has none of.
    Ensures: no kind of the operator has a body.
    """

    def requires(self, model: ir.Model) -> None:
        calls = [n.op_type for n in model.graph if n.domain == contract.DOMAIN]
        require(
            contract.KEY_BIAS_OP_TYPE not in calls, f"no plugin takes {contract.KEY_BIAS_OP_TYPE}"
        )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        bodies = _bodies(model)
        for identifier in bodies:
            del model.functions[identifier]
        return ir.passes.PassResult(model, bool(bodies))

    def ensures(self, model: ir.Model) -> None:
        ensure(not _bodies(model), f"{contract.OP_TYPE} still has a body")


def _bodies(model: ir.Model) -> list[ir.OperatorIdentifier]:
    return [key for key in model.functions if key[0] == contract.DOMAIN and key[1] in OPERATORS]
