"""Graph passes on small graphs in ONNX's text form, and on a whole exported model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

from lminf_export import export
from lminf_export.export.passes.constant_reshape_targets import ConstantReshapeTargetsPass
from lminf_export.export.passes.fuse_rms_norm import FuseRmsNormPass
from lminf_export.export.passes.keep_tokens_flat import KeepTokensFlatPass
from lminf_export.export.passes.linear_to_gemm import LinearToGemmPass
from tests.support.small_graphs import LINEAR, NORM, NORM_OF_ONE_MORE, VIEW, parsed
from tests.support.tiny_models import save_llama


def outputs(model: ir.Model, x: np.ndarray) -> np.ndarray:
    text = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(text, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def counts(model: ir.Model) -> Counter:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(
    ("text", "change", "gone", "there"),
    [
        (LINEAR, LinearToGemmPass(), "MatMul", "Gemm"),
        (NORM, FuseRmsNormPass(), "Pow", "RMSNormalization"),
        (NORM_OF_ONE_MORE, FuseRmsNormPass(), "Pow", "RMSNormalization"),
        (VIEW, ConstantReshapeTargetsPass(), None, "Constant"),
    ],
    ids=[
        "linear_to_gemm",
        "fuse_rms_norm",
        "fuse_rms_norm_of_one_more",
        "constant_reshape_targets",
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 6), (3, 7, 6), (2, 0, 6)])
def test_a_pass_keeps_the_values(text, change, gone, there, shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    wanted = outputs(parsed(text), x)
    model = parsed(text)
    change(model)
    common.RemoveUnusedNodesPass()(model)
    assert there in counts(model)
    assert gone not in counts(model)
    if isinstance(change, FuseRmsNormPass):
        np.testing.assert_allclose(outputs(model, x), wanted, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(outputs(model, x).shape, wanted.shape)
        np.testing.assert_allclose(outputs(model, x), wanted, rtol=1e-6, atol=1e-6)


def test_a_norm_over_another_axis_is_left_alone():
    model = parsed(NORM.replace("axes = {-1}", "axes = {1}"))
    FuseRmsNormPass()(model)
    assert "RMSNormalization" not in counts(model)


def test_tokens_stay_rows_from_projection_to_projection():
    text = LINEAR.replace(
        "y = Add (m, b)", "z = Add (m, b)\n    g = Sigmoid (z)\n    y = Mul (z, g)"
    )
    model = parsed(text)
    LinearToGemmPass()(model)
    KeepTokensFlatPass()(model)
    ranks = {
        len(n.inputs[0].shape) for n in model.graph if n.op_type == "Mul" and n.inputs[0].shape
    }
    assert ranks <= {2}
    x = np.random.default_rng(2).normal(size=(3, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(outputs(model, x), outputs(parsed(text), x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_an_exported_layer_holds_what_it_must_and_no_more(tmp_path):
    graphs = []
    for layers in (3, 4):
        folder = save_llama(tmp_path / f"m{layers}", num_hidden_layers=layers)
        bundle = export(folder, tmp_path / f"b{layers}", window_size=16, chunk_size=8)
        graph = onnx.load(str(bundle.graph_path), load_external_data=False).graph
        graphs.append(Counter(node.op_type for node in graph.node))
    a_layer = graphs[1] - graphs[0]
    assert a_layer == Counter(
        {
            "Linear": 5,  # q, k, v, gate, up
            "LinearAdd": 2,  # o and down, each with the residual
            "RMSNormalization": 2,
            "LambdaAttention": 1,
            "Transpose": 4,
            "Reshape": 4,  # q, k, v into heads, and back into rows
            "Sigmoid": 1,
            "Mul": 2,
        }
    )
