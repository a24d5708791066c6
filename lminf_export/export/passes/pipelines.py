"""Graph passes: one file each, stating what it requires and ensures."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from lminf_export.export.passes.fuse_rms_norm import fuse_rms_norm
from lminf_export.export.passes.keep_tokens_flat import stay_flat
from lminf_export.export.passes.linear_to_gemm import linear_to_gemm
from lminf_export.export.passes.reshape_targets import constant_reshape_targets


def optimize(model: ir.Model) -> None:
    """Simplify a traced model in place; weights are never read.

    Requires: weights are initializers without data, the operator's function is not attached.
    Ensures: the same outputs; every projection is a Gemm on the checkpoint's own layout.
    """
    constant_reshape_targets(model)
    # Transposes of weights must not be folded: that would copy the weight into the graph.
    optimizer.fold_constants_ir(
        model, should_fold=lambda node: False if node.op_type == "Transpose" else None
    )
    fuse_rms_norm(model)
    linear_to_gemm(model)
    stay_flat(model)
    for step in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
