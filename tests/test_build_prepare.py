"""The graph an engine's parser takes computes what the exported graph computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from lminf_export.engine.common import profiles
from lminf_export.errors import EngineError
from lminf_export.export.engine_graph import write_engine_graph
from lminf_export.operator import bindings
from tests.support.engine_graphs import request_of, run
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(sliding_window=5)


def prepared(tiny, folder):
    bundle = tiny.write(folder / "bundle")
    out = bundle.path / "prepared.onnx"
    write_engine_graph(bundle.graph_path, request_of(tiny, bundle.path, onnx_path=out))
    return bundle.graph_path, out


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return prepared(TINY, tmp_path_factory.mktemp("prepare"))


def test_the_prepared_graph_equals_the_exported_one_while_no_chunk_crosses_a_rings_end(graphs):
    exported, ready = graphs
    # The same operations in the same order, so the same bits.
    np.testing.assert_array_equal(run(ready, TINY), run(exported, TINY))


def test_a_model_without_sinks_is_prepared_to_the_same_numbers(tmp_path):
    tiny = TinyModel(num_sink_tokens=0, window_size=8)
    exported, ready = prepared(tiny, tmp_path)
    np.testing.assert_array_equal(run(ready, tiny), run(exported, tiny))


def test_rings_are_numbers_and_everything_else_stays_a_symbol(graphs):
    model = ir.load(graphs[1])
    shapes = {v.name: v.shape.dims for v in (*model.graph.inputs, *model.graph.outputs)}
    contract = TINY.contract
    rings = contract.ring_sizes()
    for spec in (*contract.inputs(), *contract.outputs()):
        found = [d if isinstance(d, int) else d.value for d in shapes[spec.name]]
        assert found == [rings.get(d, d) for d in spec.shape]


def test_no_function_and_no_circular_write_is_left(graphs):
    model = ir.load(graphs[1])
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}
    writes = [node for node in model.graph if node.op_type == "TensorScatter"]
    assert len(writes) == 2 * len(TINY.layers)
    assert {node.attributes["mode"].as_string() for node in writes} == {"linear"}


def test_the_weights_stay_where_they_are(graphs):
    exported, ready = graphs
    weights = (exported.parent / "model.onnx.data").stat().st_size
    assert ready.stat().st_size < weights
    files = {
        x.const_value.location
        for x in ir.load(ready).graph.initializers.values()
        if isinstance(x.const_value, ir.ExternalTensor)
    }
    assert files == {"model.onnx.data"}


def test_a_node_is_named_after_what_it_makes(graphs):
    names = {node.name for node in ir.load(graphs[1]).graph}
    assert {bindings.present_name(0, "key"), bindings.LOGITS} <= names


def test_a_graph_of_other_layers_is_refused(graphs, tmp_path):
    contract = replace(TINY.contract, layers=TINY.layers[:1])
    out = graphs[0].parent / "other.onnx"
    request = request_of(TINY, graphs[0].parent, onnx_path=out, contract=contract)
    with pytest.raises(EngineError, match=r"model\.onnx: the graph writes 4 rings .* have 2"):
        write_engine_graph(graphs[0], request)
    assert not out.exists()


def test_bytes_that_are_no_graph_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff\xff\xff\xff")
    request = request_of(TINY, tmp_path, onnx_path=tmp_path / "out.onnx")
    with pytest.raises(EngineError, match=r"model\.onnx is not an ONNX model"):
        write_engine_graph(path, request)
    with pytest.raises(EngineError, match="No such file"):
        write_engine_graph(tmp_path / "x.onnx", request)


def test_profiles_are_single_tokens_and_chunks(tmp_path):
    single, chunk = profiles(request_of(TINY, tmp_path, max_batch_size=5))
    assert single == {"batch": (1, 5, 5), "sequence": (1, 1, 1), "num_logits": (1, 1, 1)}
    assert chunk == {"batch": (1, 5, 5), "sequence": (1, 7, 7), "num_logits": (1, 1, 7)}


def test_a_chunk_of_one_token_needs_one_profile(tmp_path):
    (only,) = profiles(request_of(TINY, tmp_path, chunk_size=1))
    assert only == {"batch": (1, 1, 1), "sequence": (1, 1, 1), "num_logits": (1, 1, 1)}


@pytest.mark.parametrize("name", ["chunk_size", "max_batch_size"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_a_size_below_one_is_refused(tmp_path, name, value):
    with pytest.raises(EngineError, match=name):
        request_of(TINY, tmp_path, **{name: value})
