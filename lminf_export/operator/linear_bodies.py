"""The operators of products with weights, in the operators that run without a kernel.

    Linear(x (M, K), weight (N, K)) → y (M, N) = x · weightᵀ
    LinearAdd(x, weight, addend (N) or (M, N)) → y = x · weightᵀ + addend
    LinearNBits(x, weight, scales[, zero_points]) → y = x · weightᵀ
    LinearNBitsAdd(x, weight, scales, addend[, zero_points]) → y = x · weightᵀ + addend

The bodies are Gemm, and onnxruntime's MatMulNBits for weights in blocks of integers, whose storage
and attributes the last two have; scales may be float16 where everything else is float32. That is
what runs wherever no kernel is registered. The CPU kernels (`plugins/onnxruntime/linear_op.h`,
`linear_nbits_op.h`) take the nodes instead and read a weight where it lies: onnxruntime's own keep
a packed copy of every weight in memory.
"""

from __future__ import annotations

import onnx
import onnx.parser

from lminf_export.operator import contract
from lminf_export.operator.attention_body import OPSET

LINEAR, LINEAR_ADD = "Linear", "LinearAdd"
LINEAR_NBITS, LINEAR_NBITS_ADD = "LinearNBits", "LinearNBitsAdd"
NBITS_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")
CONTRIB_DOMAIN = "com.microsoft"
_INPUTS = {LINEAR: "x, weight", LINEAR_ADD: "x, weight, addend"}


def linear_body(op_type: str) -> onnx.FunctionProto:
    """Return Linear or LinearAdd as a model-local function."""
    inputs = _INPUTS[op_type]
    return onnx.parser.parse_function(
        f'<opset_import: ["" : {OPSET}], domain: "{contract.DOMAIN}">\n'
        f"{op_type} ({inputs}) => (y)\n{{\n  y = Gemm <transB: int = 1> ({inputs})\n}}"
    )


def nbits_body(op_type: str, *, zero_points: bool, half_scales: bool = False) -> onnx.FunctionProto:
    """Return LinearNBits or LinearNBitsAdd as a function.

    Args:
        op_type: which of the two.
        zero_points: it has that input, last; a node may leave it out.
        half_scales: scales may be float16 where x is float32.
    """
    zeros = ", zero_points" if zero_points else ""
    attributes = ", ".join(f"{name}: int = @{name}" for name in NBITS_ATTRIBUTES)
    scales = "wide" if half_scales else "scales"
    product = f"{CONTRIB_DOMAIN}.MatMulNBits <{attributes}> (x, weight, {scales}{zeros})"
    adds = op_type == LINEAR_NBITS_ADD
    body = f"product = {product}\n  y = Add (product, addend)" if adds else f"y = {product}"
    if half_scales:
        body = f"wide = CastLike (scales, x)\n  {body}"
    inputs = f"x, weight, scales{', addend' if adds else ''}{zeros}"
    return onnx.parser.parse_function(
        f'<opset_import: ["" : {OPSET}, "{CONTRIB_DOMAIN}" : 1], domain: "{contract.DOMAIN}">\n'
        f"{op_type} <{', '.join(NBITS_ATTRIBUTES)}> ({inputs}) => (y)\n{{\n  {body}\n}}"
    )
