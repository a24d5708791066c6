"""A bundle with an int8 cache from export to stream, and everything that must say what it is."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import lminf_export
from lminf_export.cli.export import export_command
from lminf_export.cli.main import cli
from lminf_export.engine.options import EngineOptions
from lminf_export.errors import ConfigError, SessionError
from lminf_export.operator.bindings import SCALE_KINDS, past_name
from lminf_export.operator.contract import INT8_CACHE_OP_TYPE, OP_TYPE
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.runtime.kernels import INSTALLED, find_kernels
from lminf_export.verify.validate import validate
from tests.support.tiny_models import save_llama

KERNELS = [
    "none",
    pytest.param(
        "auto",
        marks=pytest.mark.skipif(
            not INSTALLED.is_file(), reason="no C++ compiler, no kernels were built"
        ),
    ),
]
WINDOW, CHUNK, SINKS = 13, 7, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("m") / "llama")


def exported(model, out, **options):
    settings = {"window_size": WINDOW, "chunk_size": CHUNK, "num_sink_tokens": SINKS}
    return lminf_export.export(model, out, **{**settings, "kv_cache_dtype": "int8", **options})


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return exported(model, tmp_path_factory.mktemp("b") / "int8")


@pytest.mark.slow
def test_the_contract_has_int8_rings_and_their_scales(bundle):
    inputs = {tensor.name: tensor for tensor in bundle.manifest.inputs}
    assert inputs[past_name(0, "key")].dtype == "int8"
    assert inputs[past_name(0, "sink_key")].dtype == "float32"
    for kind in SCALE_KINDS:
        scale = inputs[past_name(2, kind)]
        assert (scale.dtype, scale.shape) == ("float32", ("batch", 2, "ring_21", 1))
    graph = onnx.load(bundle.graph_path, load_external_data=False)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count(INT8_CACHE_OP_TYPE) == 3
    assert OP_TYPE not in kinds
    assert {f.name for f in graph.functions} == {INT8_CACHE_OP_TYPE, "Linear", "LinearAdd"}


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    return exported(model, tmp_path_factory.mktemp("p") / "plain", kv_cache_dtype="auto")


@pytest.mark.slow
def test_a_bundle_without_the_option_does_not_mention_it(plain):
    assert "kv_cache_dtype" not in (plain.path / "lminf.json").read_text()
    assert b"int8" not in plain.graph_path.read_bytes()
    assert b"Int8" not in plain.graph_path.read_bytes()
    assert plain.manifest.kv_cache_dtype is None


def test_the_cache_takes_a_byte_an_element_and_four_a_row(bundle):
    state = lminf_export.load(bundle.path, kernels="none").new_state(3)
    heads, dim, ring = 2, 10, 21
    layer = 2 * heads * (ring * (dim + 4) + SINKS * dim * 4)
    assert bundle.manifest.cache_bytes_per_sequence == 3 * layer
    assert state.max_nbytes == 3 * 3 * layer
    assert state.nbytes < state.max_nbytes  # the ring has not grown yet


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_bundle_computes_the_specification(bundle, kernels):
    report = validate(bundle.path, num_tokens=97, kernels=kernels)
    assert report.passed
    assert report.kv_cache_dtype == "int8"


OTHERS = {
    "float16": {"dtype": "float16"},
    "no_sinks": {"num_sink_tokens": 0},
    "quantised_weights": {"quantize": QuantizeConfig("int8", accuracy_level=1, block_size=16)},
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_bundles_compute_the_specification(name, tmp_path):
    source = save_llama(tmp_path / "llama", num_hidden_layers=1)
    report = validate(exported(source, tmp_path / "b", **OTHERS[name]).path, num_tokens=61)
    assert report.passed


@pytest.mark.parametrize("kernels", KERNELS)
def test_ragged_streams_that_wrap_are_those_of_each_alone(bundle, kernels):
    model = lminf_export.load(bundle.path, kernels=kernels)
    rng = np.random.default_rng(7)
    ids, lengths = rng.integers(0, 131, (3, 120)), (120, 61, 3)
    state, offset = model.new_state(3), np.zeros(3, np.int64)
    last = np.zeros((3, 131), np.float32)
    while (left := np.array(lengths) - offset).any():
        width = int(rng.integers(1, CHUNK + 1))
        count = np.minimum(left, width)
        step = np.zeros((3, width), np.int64)
        for row in range(3):
            step[row, : count[row]] = ids[row, offset[row] : offset[row] + count[row]]
        logits = model.forward(step, state, lengths=count)
        for row in np.flatnonzero(count):
            last[row] = logits[row, count[row] - 1]
        offset += count
    for row, length in enumerate(lengths):
        alone = model.forward(ids[row : row + 1, :length], model.new_state())[0, -1]
        # Apart from ties, which another order of sums may decide otherwise.
        assert np.abs(last[row] - alone).max() < 2e-3 * np.ptp(alone)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_snapshot_goes_on_where_it_was_taken(bundle, kernels):
    model = lminf_export.load(bundle.path, kernels=kernels)
    ids = np.random.default_rng(3).integers(0, 131, (1, 70))
    state = model.new_state()
    model.forward(ids[:, :50], state)
    saved = model.session.snapshot(state)
    assert saved.caches[past_name(1, "value")].dtype == np.int8
    assert saved.caches[past_name(1, "value_scale")].shape[-1] == 1
    wanted = model.forward(ids[:, 50:], state).copy()
    again = model.new_state()
    model.session.restore(again, saved)
    np.testing.assert_array_equal(model.forward(ids[:, 50:], again), wanted)


def test_the_cost_in_perplexity_is_measured_on_a_text(bundle, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 37 % 131}" for i in range(200)))
    found = CliRunner().invoke(cli, ["validate", str(bundle.path), "--text", str(text)])
    assert found.exit_code == 0, found.output
    assert "quantised: int8 cache" in found.output
    assert "perplexity cost of quantisation: " in found.output
    assert "over" in found.output.splitlines()[-1]


def test_every_command_says_what_the_cache_is(bundle):
    def output(*arguments):
        found = CliRunner().invoke(cli, [*arguments])
        assert found.exit_code == 0, found.output
        return found.output

    assert "int8, a float32 scale" in output("inspect", str(bundle.path))
    shown = json.loads(output("inspect", str(bundle.path), "--json"))
    assert shown["manifest"]["kv_cache_dtype"] == "int8"
    assert shown["cache"]["bytes_per_sequence"] == bundle.manifest.cache_bytes_per_sequence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"builder": "none", "engine_options": EngineOptions(plugin="none")},
            "needs the plugin .*cache has type Int8 but must have type Float, Half, or BFloat16",
        ),
        ({"dtype": "bfloat16"}, "is for graphs in float32 or float16"),
        ({"kv_cache_dtype": "fp8"}, "must be one of auto, int8"),
    ],
    ids=["standard_operators", "bfloat16", "unknown"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(model, tmp_path, options, message):
    options = {"kv_cache_dtype": "int8", "out": "e", **options}
    out = tmp_path / options.pop("out")
    with pytest.raises(ConfigError, match=message) as raised:
        lminf_export.export(model, out, window_size=WINDOW, **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_an_engine_without_the_plugin_costs_one_line_and_exit_2(model, tmp_path):
    command = ["--model", str(model), "--out", str(tmp_path / "e" / "engine.plan")]
    command += ["--builder", "none", "--plugin", "none"]
    found = CliRunner().invoke(export_command, [*command, "--kv-cache-dtype", "int8"])
    assert found.exit_code == 2
    assert found.output.count("\n") == 1
    assert "kv_cache_dtype='int8'" in found.output


@pytest.mark.skipif(not INSTALLED.is_file(), reason="no kernels were built")
def test_a_provider_without_a_kernel_for_int8_gets_the_function_body():
    assert find_kernels("auto", "cpu", "int8") is not None
    assert find_kernels("auto", "cuda", "int8") is None
    with pytest.raises(SessionError, match="'cuda' and int8 caches; use kernels='none'"):
        find_kernels(INSTALLED, "cuda", "int8")
