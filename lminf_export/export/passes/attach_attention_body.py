"""The operator's body in standard operators, beside the graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require
from lminf_export.operator import attention_body, contract
from lminf_export.operator.attention_body import BodyFeatures


@dataclass(frozen=True)
class AttachAttentionBodyPass(ir.passes.InPlacePass):
    """Attach the function that every attention node of the graph is a call of.

    Requires: all attention nodes are of the kind of cache that the features name.
    Ensures: every node of this package's domain has a body.

    Attributes:
        features: what the body needs.
    """

    features: BodyFeatures

    def requires(self, model: ir.Model) -> None:
        wanted = contract.op_type(int8_cache=self.features.int8_cache)
        kinds = {contract.OP_TYPE, contract.INT8_CACHE_OP_TYPE}
        found = {n.op_type for n in model.graph if n.domain == contract.DOMAIN} & kinds
        require(found <= {wanted}, f"the graph has {sorted(found)} nodes where {wanted} is meant")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        editing.attach_function(model, attention_body.function_body(self.features))
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        ours = {node.op_identifier() for node in model.graph if node.domain == contract.DOMAIN}
        missing = ours - model.functions.keys()
        ensure(not missing, f"nodes have no body: {sorted(missing)}")
