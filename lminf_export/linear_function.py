"""`lminf::Linear` and `lminf::LinearAdd`: products with weights, in standard operators.

    Linear(x (M, K), weight (N, K)) → y (M, N) = x · weightᵀ
    LinearAdd(x, weight, addend (N) or (M, N)) → y = x · weightᵀ + addend

The bodies are Gemm, and that is what runs wherever no kernel is registered. The CPU kernel
(`plugins/onnxruntime/linear_op.h`) takes the nodes instead and reads a weight where it lies:
onnxruntime's Gemm keeps a packed copy of every weight in memory of its own.
"""

from __future__ import annotations

import onnx
import onnx.parser

from lminf_export import op
from lminf_export.onnx_function import OPSET

LINEAR, LINEAR_ADD = "Linear", "LinearAdd"
_INPUTS = {LINEAR: "x, weight", LINEAR_ADD: "x, weight, addend"}


def linear_body(op_type: str) -> onnx.FunctionProto:
    """Return one of the two operators as a model-local function."""
    inputs = _INPUTS[op_type]
    return onnx.parser.parse_function(
        f'<opset_import: ["" : {OPSET}], domain: "{op.DOMAIN}">\n'
        f"{op_type} ({inputs}) => (y)\n{{\n  y = Gemm <transB: int = 1> ({inputs})\n}}"
    )
