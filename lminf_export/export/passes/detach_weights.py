"""A traced graph's initializers lose their data: torch's tensors without numbers."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, require


class DetachWeightsPass(ir.passes.InPlacePass):
    """Take the data from initializers: to later passes a tensor must not look like a constant.

    Requires: initializers say their types and shapes without it.
    Ensures: an initializer is its name, type and shape.
    """

    def requires(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            known = editing.num_bytes(value) is not None
            require(known, f"the initializer {value.name} lacks a type or a shape")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.initializers.values():
            value.const_value = None
        return ir.passes.PassResult(model, bool(model.graph.initializers))

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            ensure(value.const_value is None, f"the initializer {value.name} has data")
