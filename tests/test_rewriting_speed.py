"""What makes rewritten graphs fast, and rewriting small: the same numbers by other operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import lminf_export
from lminf_export.rewriting import lighter
from lminf_export.runtime.onnxruntime import weights_of_bytes
from tests.support.foreign_graphs import HEAD_DIM, KV_HEADS, LAYERS, ForeignGraph
from tests.support.kernel_sets import needs_kernels

_OPTIONS = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 7}
_PRODUCTS = 5 * LAYERS + 1


def _kinds(folder: Path) -> Counter[str]:
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def _logits(folder: Path, kernels: str, steps: tuple[int, ...]) -> np.ndarray:
    model = lminf_export.load(folder, kernels=kernels, threads=1)
    state = model.new_state()
    tokens = np.random.default_rng(3).integers(0, 53, (1, sum(steps)))
    found = []
    for step in steps:
        ids, tokens = tokens[:, :step], tokens[:, step:]
        found.append(model.forward(ids, state))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(
    ("form", "operator"),
    [
        ({}, "LinearNBits"),
        ({"zero_points": True}, "LinearNBits"),
        ({"bias": True}, "LinearNBitsAdd"),
        ({"bias": True, "zero_points": True}, "LinearNBitsAdd"),
    ],
)
def test_products_in_blocks_become_operators_of_rows(form, operator, tmp_path):
    """The check of the rewrite compares the numbers."""
    model = ForeignGraph(**form).save(tmp_path / "model")
    lminf_export.rewrite(model, tmp_path / "out", **_OPTIONS)
    kinds = _kinds(tmp_path / "out")
    assert kinds["MatMulNBits"] == 0
    assert kinds[operator] == _PRODUCTS
    # For all layers' heads one transposition before attention, one behind it.
    assert kinds["Transpose"] == 2 * LAYERS
    # Rows of the embedding and its norm, the head's rows in and out; into heads and out of them.
    assert kinds["Reshape"] == 5 + 2 * LAYERS


def test_norms_of_heads_stay_in_heads(tmp_path):
    model = ForeignGraph(norms_of_heads=True).save(tmp_path / "model")
    lminf_export.rewrite(model, tmp_path / "out", **_OPTIONS)
    kinds = _kinds(tmp_path / "out")
    assert kinds["LinearNBits"] == _PRODUCTS + 2 * LAYERS
    assert kinds["Reshape"] == 5 + 4 * LAYERS, "queries, keys, values and the result, once each"


def test_a_product_of_another_form_stays_as_it_is(tmp_path):
    model = ForeignGraph(ordered=True).save(tmp_path / "model")
    lminf_export.rewrite(model, tmp_path / "out", **_OPTIONS)
    kinds = _kinds(tmp_path / "out")
    assert kinds["MatMulNBits"] == _PRODUCTS
    assert kinds["LinearNBits"] == 0


@needs_kernels
def test_kernels_compute_what_the_bodies_do(tmp_path):
    model = ForeignGraph(zero_points=True, norms_of_heads=True).save(tmp_path / "model")
    lminf_export.rewrite(model, tmp_path / "out", **_OPTIONS)
    path = tmp_path / "out" / "model.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    levels = [a for node in proto.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert len(levels) == _PRODUCTS + 2 * LAYERS
    assert all(level.i == 4 for level in levels), "as the original has it"
    by_kernels = _logits(tmp_path / "out", "auto", (7, 5, 1, 1))
    by_bodies = _logits(tmp_path / "out", "none", (7, 5, 1, 1))
    # Activations are rounded to int8 by both: a near-tie goes either way.
    assert np.abs(by_kernels - by_bodies).max() < 2e-2 * np.ptp(by_bodies)


def _session(model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    weights_of_bytes(folder, ["model.onnx.data"], options)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _feeds(tokens: int) -> dict[str, np.ndarray]:
    empty = np.zeros((1, KV_HEADS, 0, HEAD_DIM), np.float32)
    caches = {
        f"past_key_values.{layer}.{kind}": empty
        for layer in range(LAYERS)
        for kind in ("key", "value")
    }
    ids = np.arange(tokens)[None] + 1
    return {"input_ids": ids, "attention_mask": np.ones((1, tokens), np.int64), **caches}


@pytest.mark.parametrize("form", [{}, {"zero_points": True, "bias": True}])
def test_products_in_pieces_differ_by_rounding_only(form, tmp_path, monkeypatch):
    model = ForeignGraph(**form).save(tmp_path / "model")
    whole = onnx.load(str(model / "model.onnx"), load_external_data=False)
    pieces = onnx.ModelProto()
    pieces.CopyFrom(whole)
    # The head of 53 rows in 4 pieces; what has no file of its own, such as a bias, stays whole.
    monkeypatch.setattr(lighter, "_LARGEST", 53 * 32)
    lighter.in_pieces(pieces.graph)
    count = Counter(node.op_type for node in pieces.graph.node)
    assert count["Concat"] == _PRODUCTS
    assert count["MatMulNBits"] > 3 * _PRODUCTS
    found, wanted = (_session(m, model).run(["logits"], _feeds(5))[0] for m in (pieces, whole))
    # The same products; packed weights of other widths are added up in another order.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.ptp(wanted))


def test_graphs_without_products_have_the_same_shapes(tmp_path):
    model = ForeignGraph(bias=True).save(tmp_path / "model")
    whole = onnx.load(str(model / "model.onnx"), load_external_data=False)
    light = onnx.ModelProto()
    light.CopyFrom(whole)
    lighter.without_products(light.graph)
    assert all(node.op_type != "MatMulNBits" for node in light.graph.node)
    for graph in (whole.graph, light.graph):
        shown = [helper.make_empty_tensor_value_info(f"m{i}") for i in range(LAYERS)]
        graph.output.extend(shown)
    found, wanted = (_session(m, model).run(None, _feeds(5)) for m in (light, whole))
    assert [x.shape for x in found] == [x.shape for x in wanted]


def test_a_number_added_to_a_product_is_no_bias(tmp_path):
    """A bias has a number for each result; one number is added as it was."""
    path = ForeignGraph().save(tmp_path / "model") / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    place, node = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "MatMulNBits")
    name, node.output[0] = node.output[0], "product"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([0.25]), "quarter"))
    model.graph.node.insert(place + 1, helper.make_node("Add", ["product", "quarter"], [name]))
    onnx.save(model, path)
    lminf_export.rewrite(path, tmp_path / "out", **_OPTIONS)  # compares it with the original
    assert _kinds(tmp_path / "out")["LinearNBits"] == _PRODUCTS
