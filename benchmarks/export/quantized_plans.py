"""Which quantised weights TensorRT for RTX keeps quantised, read off the size of its plans.

One product with a square matrix is built for each form of its weights; a builder that dequantises
them while it builds writes a plan as large as that of float16. Needs no GPU.

    python -m benchmarks.export.quantized_plans --out benchmarks/results/quantized_plans.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from benchmarks.support.result import write_result
from lminf_export.runtime.environment import environment

BLOCK = 32
BITS = {TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.FLOAT8E4M3FN: 8}
# Name → element type and columns that share a scale (0: the whole row).
FORMS: dict[str, tuple[int, int] | None] = {
    "float16": None,
    f"INT4, blocks of {BLOCK}": (TensorProto.INT4, BLOCK),
    "INT8, one scale an output feature": (TensorProto.INT8, 0),
    f"INT8, blocks of {BLOCK}": (TensorProto.INT8, BLOCK),
    "fp8, one scale an output feature": (TensorProto.FLOAT8E4M3FN, 0),
    f"fp8, blocks of {BLOCK}": (TensorProto.FLOAT8E4M3FN, BLOCK),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, form in FORMS.items():
        weights_bytes, plan = build(product(arguments.size, form))
        kept = None if plan is None else len(plan) < 1.5 * weights_bytes
        rows.append(
            {
                "weights": name,
                "weights_bytes": weights_bytes,
                "plan_bytes": None if plan is None else len(plan),
                "kept": kept,
            }
        )
        print(rows[-1], file=sys.stderr)
    result = {
        "benchmark": "quantized_plans",
        "builder": f"tensorrt-rtx {trt.__version__}",
        "size": arguments.size,
        "rows": rows,
        **environment(),
    }
    write_result(arguments.out, result)


def product(size: int, form: tuple[int, int] | None) -> onnx.ModelProto:
    """Return a graph of one product, x (batch, K) float16 with weights (N, K), N = K = size."""
    random = np.random.default_rng(0)
    half = TensorProto.FLOAT16
    nodes, weight = [], "weight"
    if form is None:
        dense = random.uniform(-1, 1, (size, size)).astype(np.float16)
        tensors = [helper.make_tensor("weight", half, dense.shape, dense.tobytes(), raw=True)]
    else:
        kind, block = form
        packed = random.integers(0, 120, size * size * BITS[kind] // 8, dtype=np.uint8)
        shape = (size, size // block) if block else (size,)
        scales = random.uniform(0.01, 0.02, shape).astype(np.float16)
        tensors = [
            helper.make_tensor("weight", kind, (size, size), packed.tobytes(), raw=True),
            helper.make_tensor("scales", half, shape, scales.tobytes(), raw=True),
        ]
        attributes = {"axis": 1, "block_size": block} if block else {"axis": 0}
        weight = "dense"
        nodes = [helper.make_node("DequantizeLinear", ["weight", "scales"], [weight], **attributes)]
    nodes.append(helper.make_node("Gemm", ["x", weight], ["y"], transB=1))
    ends = [helper.make_tensor_value_info(name, half, ("batch", size)) for name in "xy"]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def build(model: onnx.ModelProto) -> tuple[int, bytes | None]:
    """Return the bytes of a graph's weights, and its plan; None where the builder refuses it."""
    weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse(model.SerializeToString()):
        return weights_bytes, None
    size = network.get_input(0).shape[1]
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, size), (1, size), (8, size))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return weights_bytes, None if plan is None else bytes(plan)


if __name__ == "__main__":
    main()
