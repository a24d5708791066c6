"""`lminf::Linear` and `LinearAdd`: the kernel, the body, and what a step of a model then costs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import lminf_export
from lminf_export.operator.linear_bodies import LINEAR, LINEAR_ADD
from lminf_export.runtime.kernels import INSTALLED
from tests.support.kernel_sets import SETS, instruction_set, needs_kernels
from tests.support.linear_nodes import linear_node
from tests.support.linear_sessions import numbers, session, steps_events
from tests.support.tiny_models import save_llama

# Rows of few and of many tokens; features that no vector, strip, panel or depth divides.
TOKENS = (0, 1, 2, 3, 7, 8, 9, 31, 67)
FEATURES = ((1, 1), (5, 3), (67, 17), (131, 300), (64, 768), (3, 1031))


@pytest.fixture(params=SETS)
def kernels(request):
    """The installed library, on one instruction set."""
    with instruction_set(request.param):
        yield str(INSTALLED)


@pytest.mark.parametrize("rank", [0, 1, 2], ids=["plain", "bias", "residual"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_kernel_is_the_product(kernels, dtype, rank):
    for out, width in FEATURES:
        weight = numbers(1, (out, width), dtype)
        model = linear_node(LINEAR_ADD if rank else LINEAR, weight, rank)
        runs = {threads: session(model, kernels, threads) for threads in (1, 2)}
        for tokens in TOKENS:
            x = numbers(tokens, (tokens, width), dtype)
            addend = numbers(2, (tokens, out)[2 - rank :], dtype) if rank else np.zeros(1)
            feed = {"x": x} | ({"addend": addend} if rank else {})
            found = {threads: run.run(None, feed)[0] for threads, run in runs.items()}
            np.testing.assert_array_equal(found[1], found[2])
            wanted = x.astype(np.float64) @ weight.astype(np.float64).T + addend
            # Sums in float32, however they are ordered, and one rounding to the result's type.
            size = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T + 1
            bound = size * 2.0**-20 + np.abs(wanted) * np.finfo(dtype).eps
            assert found[1].shape == wanted.shape
            assert np.all(np.abs(found[1] - wanted) <= bound)


def test_without_a_kernel_the_body_runs():
    weight, x = numbers(0, (5, 7), np.float32), numbers(1, (3, 7), np.float32)
    plain = session(linear_node(LINEAR, weight), None).run(None, {"x": x})[0]
    np.testing.assert_allclose(plain, x @ weight.T, rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": (2, 7), "addend": (3, 5)}, r"addend has shape \(3, 5\), expected \(2, 5\) or \(5\)"),
        ({"x": (2, 6), "addend": (2, 5)}, r"x has shape \(2, 6\) and weight \(5, 7\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(feed, message):
    weight = numbers(0, (5, 7), np.float32)
    model = onnx.load_from_string(linear_node(LINEAR_ADD, weight, 2))
    for value in model.graph.input:
        for index, name in enumerate(("rows", "columns")):
            value.type.tensor_type.shape.dim[index].dim_param = f"{value.name}_{name}"
    with pytest.raises(Exception, match=message):
        session(model.SerializeToString(), str(INSTALLED)).run(
            None, {name: numbers(0, shape, np.float32) for name, shape in feed.items()}
        )


# --- what a step of a whole model costs ---------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    source = save_llama(folder / "m", num_hidden_layers=2)
    return lminf_export.export(source, folder / "b", window_size=256, chunk_size=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernels", [pytest.param("auto", marks=needs_kernels), pytest.param("none")]
)
def test_a_step_passes_over_the_ring_and_copies_none(bundle, kernels, tmp_path):
    layers = bundle.manifest.layer_specs
    layer = layers[0]
    ring = layer.num_kv_heads * layer.ring_capacity * layer.head_dim * bundle.manifest.item_size
    events = steps_events(bundle, kernels, tmp_path)
    # Whoever has the whole ring as a result wrote it, and in place.
    large = [e["op_name"] for e in events if int(e["output_size"]) >= ring]
    writers = {"auto": ["LambdaAttention"], "none": ["TensorScatter"] * 2}[kernels]
    assert sorted(large) == sorted(writers * len(layers))
    # Keys and values are read once each: by the operator, or by one product each.
    shape = [1, layer.num_kv_heads, layer.ring_capacity, layer.head_dim]
    readers = [
        e["op_name"]
        for e in events
        if shape in [d for t in e["input_type_shape"] for d in t.values()]
        and e["op_name"] not in ("TensorScatter", "Shape")
    ]
    products = {"auto": ["LambdaAttention"], "none": ["FusedMatMul", "MatMul"]}[kernels]
    assert sorted(readers) == sorted(products * len(layers))
