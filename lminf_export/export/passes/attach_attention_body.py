"""The operator's body in standard operators, beside the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require
from lminf_export.operator import attention_body, contract
from lminf_export.operator.attention_body import BodyFeatures


@dataclass(frozen=True)
class AttachAttentionBodyPass(ir.passes.InPlacePass):
    """Attach the functions that the attention nodes of the graph are calls of.

    Requires: all attention nodes are of the kind of cache that the features name.
    Ensures: every node of this package's domain has a body.

    Attributes:
        features: what the bodies need; whether one has a bias of keys, its node says.
    """

    features: BodyFeatures

    def requires(self, model: ir.Model) -> None:
        wanted = {
            contract.op_type(int8_cache=self.features.int8_cache, key_bias=key_bias)
            for key_bias in (False, self.features.int8_cache)
        }
        found = _attention(model)
        require(
            found <= wanted, f"the graph has {sorted(found)} nodes where {sorted(wanted)} are meant"
        )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name in sorted(_attention(model)):
            key_bias = name == contract.KEY_BIAS_OP_TYPE
            features = replace(self.features, key_bias=key_bias)
            editing.attach_function(model, attention_body.function_body(features))
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        ours = {node.op_identifier() for node in model.graph if node.domain == contract.DOMAIN}
        missing = ours - model.functions.keys()
        ensure(not missing, f"nodes have no body: {sorted(missing)}")


def _attention(model: ir.Model) -> set[str]:
    """Return the names of the attention operators that a graph has nodes of."""
    kinds = {contract.OP_TYPE, contract.INT8_CACHE_OP_TYPE, contract.KEY_BIAS_OP_TYPE}
    return {node.op_type for node in model.graph if node.domain == contract.DOMAIN} & kinds
