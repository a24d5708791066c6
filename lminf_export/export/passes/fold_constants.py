"""Compute at export what depends on constants alone."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

from lminf_export.export.passes.checking import ensure, require

# onnxscript's own limit: elements of one folded constant.
_MOST_ELEMENTS = 512 * 512


class FoldConstantsPass(ir.passes.InPlacePass):
    """Fold constants with onnxscript's folder, weights aside.

    A Transpose is never folded: that would copy a weight into the graph once data is attached.
    `optimizer.optimize_ir` was tried in its place (onnxscript 0.7.2): it leaves every MatMul on a
    transposed weight and every norm as they are.

    Requires: initializers have no data.
    Ensures: an initializer with data, which the folder made, is within the folder's limit.
    """

    def requires(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            require(value.const_value is None, f"the initializer {value.name} has data")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return optimizer.fold_constants_ir(
            model,
            output_size_limit=_MOST_ELEMENTS,
            should_fold=lambda node: False if node.op_type == "Transpose" else None,
        )

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            size = value.const_value.size if value.const_value is not None else 0
            ensure(size <= _MOST_ELEMENTS, f"{value.name} was folded to {size} elements")
