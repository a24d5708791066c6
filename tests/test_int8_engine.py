"""Engines with rings of int8: the graph for the plugin, refusals, and sessions on doubles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lminf_export.engine import compiler, plugin
from lminf_export.errors import ConfigError, EngineError
from lminf_export.export.engine_graph import write_engine_graph
from lminf_export.export.run import export
from lminf_export.operator import contract
from lminf_export.operator.attention_body import BodyFeatures, function_body
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.verify.reference_model import rounding_of
from tests.support.biased_models import save_qwen2
from tests.support.engine_graphs import request_of, run
from tests.support.rtx import needs_rtx
from tests.support.tensorrt_doubles import Setup
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

TINY = TinyModel(sliding_window=5, kv_cache_dtype="int8")
LENGTH = 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("m") / "llama", num_hidden_layers=2)


def with_body(graph, out):
    """The graph with the operator's body put back, for onnxruntime."""
    model = ir.load(graph)
    body = ir.serde.deserialize_function(function_body(BodyFeatures(int8_cache=True)))
    model.functions[body.identifier()] = body
    ir.save(model, out)
    return out


def test_the_graph_for_the_plugin_computes_what_the_exported_one_computes(tmp_path):
    bundle = TINY.write(tmp_path / "bundle")
    request = request_of(TINY, bundle.path, with_plugin=True, max_batch_size=3)
    request = replace(request, onnx_path=bundle.path / "engine.onnx")
    write_engine_graph(bundle.graph_path, request)
    nodes = [
        x for x in onnx.load(request.onnx_path, load_external_data=False).graph.node if x.domain
    ]
    assert {node.op_type for node in nodes} == {contract.INT8_CACHE_OP_TYPE}
    assert [node.name for node in nodes] == ["lambda_attention.0", "lambda_attention.1"]
    ready = with_body(request.onnx_path, bundle.path / "body.onnx")
    np.testing.assert_array_equal(run(ready, TINY), run(bundle.graph_path, TINY))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_is_exported_for_a_build_elsewhere(tmp_path, llama, dtype):
    bundle = export(
        llama,
        tmp_path / "out",
        window_size=11,
        chunk_size=7,
        dtype=dtype,
        kv_cache_dtype="int8",
        builder="none",
    )
    manifest = bundle.manifest
    assert (manifest.dtype, manifest.kv_cache_dtype) == (dtype, "int8")
    graph = onnx.load(bundle.path / "engine.onnx", load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert kinds["past_key_values.0.key"] == onnx.TensorProto.INT8
    assert kinds["past_key_values.0.key_scale"] == onnx.TensorProto.FLOAT
    nodes = [node for node in graph.node if node.domain == contract.DOMAIN]
    assert [(len(x.input), len(x.output)) for x in nodes] == [(19, 7)] * len(manifest.layer_specs)


@pytest.mark.slow
def test_a_small_bias_of_keys_stays_in_an_engines_rings_and_is_told(tmp_path):
    model = save_qwen2(tmp_path / "qwen", 3.0)
    out = tmp_path / "out"
    bundle = export(model, out, window_size=11, kv_cache_dtype="int8", builder="none")
    assert any("which the engine's int8 rings round" in x for x in bundle.manifest.notices)
    graph = onnx.load(bundle.path / "engine.onnx", load_external_data=False).graph
    ours = {node.op_type for node in graph.node if node.domain == contract.DOMAIN}
    assert ours == {contract.INT8_CACHE_OP_TYPE}
    # The reference of a validation rounds as the graph does.
    rounding = rounding_of(bundle)
    assert rounding is not None
    assert rounding.keeps_bias


def test_a_bias_that_would_fill_the_steps_of_a_ring_is_refused(tmp_path):
    model = save_qwen2(tmp_path / "qwen", 300.0)
    with pytest.raises(ConfigError, match=r"keys hold a bias of norm 4\d\d, from 50 on") as raised:
        export(model, tmp_path / "out", window_size=11, kv_cache_dtype="int8", builder="none")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 300
    assert not (tmp_path / "out").exists()


def test_a_library_from_before_is_refused_where_rings_hold_int8(tmp_path):
    library = tmp_path / "liblminf_tensorrt.so"
    library.write_bytes(b"\x7fELF getCreators LambdaAttention\0")
    plugin.check_plugin(library)
    with pytest.raises(EngineError, match="built before its plugin took rings of int8"):
        plugin.check_plugin(library, int8_cache=True)
    library.write_bytes(b"\x7fELF getCreators LambdaAttention\0LambdaAttentionInt8Cache\0")
    plugin.check_plugin(library, int8_cache=True)


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [LENGTH], [2, 1, 1, 5, 1, 13, 1, 21, 1, 1, 13]])
def test_a_session_of_the_plugin_gives_the_logits_of_single_tokens(tmp_path, monkeypatch, sizes):
    setup = Setup(tmp_path, monkeypatch, tiny=TINY, plugin="beside")
    streams = np.random.default_rng(7).integers(0, TINY.vocab_size, (2, LENGTH))
    wanted = np.stack([TINY.reference_logits(row) for row in streams])
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(2)
    assert state.nbytes == 2 * setup.bundle.manifest.cache_bytes_per_sequence
    parts, start = [], 0
    for size in sizes:
        parts.append(lm.forward(streams[:, start : start + size], state).copy())
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=1e-4, rtol=0)


def test_a_snapshot_of_integers_and_scales_goes_to_the_gpu_and_back(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch, tiny=TINY, plugin="beside")
    lm = LanguageModel(setup.bundle, setup.open())
    tokens = np.random.default_rng(3).integers(0, TINY.vocab_size, (1, 40))
    state = lm.new_state()
    lm.forward(tokens[:, :30], state)
    kept = state.snapshot()
    wanted = lm.forward(tokens[:, 30:], state).copy()
    again = lm.new_state()
    again.restore(kept)
    np.testing.assert_array_equal(lm.forward(tokens[:, 30:], again), wanted)
    assert {str(array.dtype) for array in kept.caches.values()} == {"int8", "float32"}


_UPDATE = """
<ir_version: 11, opset_import: ["": 24]>
rings ({kind}[1, 2, 64, 64] past, {kind}[1, 2, 1, 64] row, int64[1] index)
  => ({kind}[1, 2, 64, 64] present)
{{ present = TensorScatter <axis: int = 2> (past, row, index) }}
"""


@needs_rtx
@pytest.mark.parametrize("kind", ["int8", "float8e4m3fn"])
def test_the_builders_own_cache_update_still_takes_neither_int8_nor_fp8(kind):
    """Where it does one day, engines of standard operators can have such rings, too."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def log(self, severity, text):
            pass

    builder = trt.Builder(Log())
    flags = compiler._creation_flags(trt)
    parser = trt.OnnxParser(network := builder.create_network(flags), log := Log())
    model = onnx.parser.parse_model(_UPDATE.format(kind=kind))
    assert not parser.parse(model.SerializeToString())
    said = compiler.parser_message(parser)
    assert "must have type Float, Half, or BFloat16" in said
    del network, log
