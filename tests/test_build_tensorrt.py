"""TensorRT's builder with the plugin: what it is told, by a recording double and real bindings.

No machine with TensorRT and a GPU has run this builder yet. The double has no name the real
bindings of 10.16 and 11.4 lack, which is asserted where they are installed.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnx_ir as ir
import pytest

from lminf_export.engine import compiler, plugin, tensorrt_rtx
from lminf_export.engine import tensorrt as tensorrt_builder
from lminf_export.engine.child import Task
from lminf_export.engine.common import EngineRequest, profiles
from lminf_export.engine.options import EngineOptions
from lminf_export.engine.recipe import make_recipe
from lminf_export.engine.settings import require_aliases
from lminf_export.errors import EngineError, SessionError
from lminf_export.export.engine_graph import write_engine_graph
from lminf_export.operator import bindings as tensors
from lminf_export.operator import contract
from lminf_export.operator.attention_body import BodyFeatures, function_body
from lminf_export.progress import silent
from tests.support.builder_doubles import TINY, tensorrt_double
from tests.support.engine_graphs import CHUNKS, request_of, run
from tests.support.kernel_build import PLUGINS
from tests.support.tensorrt_doubles import IPluginRegistry
from tests.support.tensorrt_here import bindings_folders, run_python, stub_libraries
from tests.support.tiny_bundle import TinyModel


def plugin_request(tiny, bundle, **changes):
    """The request to build a bundle's engine with the plugin, its graph written."""
    library = bundle.path / "liblminf_tensorrt.so"
    library.write_bytes(b"a library")
    settings = {"with_plugin": True, "plugin_path": library, "max_batch_size": 3} | changes
    request = request_of(tiny, bundle.path, **settings)
    request = replace(request, onnx_path=bundle.path / "engine.onnx")
    write_engine_graph(bundle.graph_path, request)
    return request


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    bundle = TINY.write(tmp_path_factory.mktemp("plugin") / "bundle")
    return bundle, plugin_request(TINY, bundle)


def with_body(graph, out):
    """The graph with the operator's body put back, for onnxruntime."""
    model = ir.load(graph)
    body = ir.serde.deserialize_function(function_body(BodyFeatures()))
    model.functions[body.identifier()] = body
    ir.save(model, out)
    return out


def test_the_graph_for_the_plugin_computes_what_the_exported_one_computes(tmp_path):
    tiny = TinyModel(sliding_window=5)
    bundle = tiny.write(tmp_path / "bundle")
    request = plugin_request(tiny, bundle)
    ready = with_body(request.onnx_path, bundle.path / "body.onnx")
    # The same operations in the same order, so the same bits.
    assert (run(ready, tiny) == run(bundle.graph_path, tiny)).all()
    assert sum(CHUNKS) > 3 * tiny.layers[0].ring_capacity


@pytest.mark.slow
def test_an_exported_llamas_norms_are_written_out_and_stay_the_same(tmp_path):
    import numpy as np
    import onnxruntime as ort

    from lminf_export.export.run import export
    from tests.support.tiny_models import save_llama

    model = save_llama(tmp_path / "model", num_hidden_layers=2)
    bundle = export(model, tmp_path / "out", window_size=11, chunk_size=7)
    ready = bundle.path / "engine.onnx"
    request = EngineRequest(
        ready,
        bundle.path / "engine.plan",
        bundle.manifest.contract,
        7,
        2,
        with_plugin=True,
    )
    write_engine_graph(bundle.graph_path, request)
    assert "RMSNormalization" in {n.op_type for n in ir.load(bundle.graph_path).graph}
    assert "RMSNormalization" not in {n.op_type for n in ir.load(ready).graph}
    feed = {
        "input_ids": np.array([[3, 5, 7, 11, 13]] * 2),
        "past_length": np.zeros(2, np.int64),
        "new_length": np.array([5, 4]),
        "logits_index": np.array([[0, 1, 4]] * 2),
    }
    sizes = {**request.contract.ring_sizes(), tensors.BATCH: 2}
    for spec in request.contract.caches(present=False):
        feed[spec.name] = np.zeros(spec.sized(sizes), np.float32)
    found = [
        ort.InferenceSession(str(path)).run(["logits"], feed)[0]
        for path in (bundle.graph_path, with_body(ready, bundle.path / "body.onnx"))
    ]
    # float32, the mean of squares summed in another order.
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)


def test_nothing_but_the_plugin_can_take_the_nodes(written):
    _, request = written
    model = onnx.load(request.onnx_path, load_external_data=False)
    assert not model.functions
    nodes = [node for node in model.graph.node if node.domain]
    assert [node.name for node in nodes] == ["lambda_attention.0", "lambda_attention.1"]
    assert {len(node.input) for node in nodes} == {len(contract.INPUTS)}


def test_a_batch_of_one_is_fixed_in_the_graph_and_a_larger_one_stays_open(tmp_path, written):
    def first_dims(path):
        return {
            value.name: value.type.tensor_type.shape.dim[0].dim_value
            for value in onnx.load(path, load_external_data=False).graph.input
        }

    assert set(first_dims(written[1].onnx_path).values()) == {0}
    bundle = TINY.write(tmp_path / "one")
    assert set(first_dims(plugin_request(TINY, bundle, max_batch_size=1).onnx_path).values()) == {1}


def test_a_graph_of_other_layers_is_refused(written, tmp_path):
    bundle, request = written
    out = bundle.path / "other.onnx"
    contract = replace(request.contract, layers=TINY.layers[:1])
    wrong = replace(request, onnx_path=out, contract=contract)
    with pytest.raises(EngineError, match="2 LambdaAttention nodes for 1 layers"):
        write_engine_graph(bundle.graph_path, wrong)
    assert not out.exists()


def test_a_limit_no_parser_can_pass_on_is_refused(tmp_path):
    bundle = TINY.write(tmp_path / "bundle")
    model = onnx.load(bundle.graph_path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "distance_limit":
                attribute.i = 2**31
    onnx.save(model, bundle.graph_path)
    with pytest.raises(EngineError, match=r"distance_limit=2147483648 .*--plugin none"):
        plugin_request(TINY, bundle)


def compiled(written, trt=None, **options):
    """What the configuration was told, and the configuration."""
    request = replace(written[1], options=EngineOptions(**options))
    trt = trt or tensorrt_double()
    plan = request.plan_path
    config = compiler.compile_plan(trt, request, plan, silent)
    assert plan.read_bytes() == b"a plan"
    return config


def test_the_builder_is_told_to_alias_and_nothing_the_user_did_not_ask(written):
    config = compiled(written)
    told = [entry for entry in config._told if entry[0] != "profile"]
    assert told == [("clear", "TF32"), ("preview", "ALIASED_PLUGIN_IO_10_03", True)]
    assert config.builder_optimization_level == 3
    assert config.plugins_to_serialize == []


def test_caches_that_are_only_bound_are_no_word_to_the_builder(written):
    told = compiled(written, cache_aliasing="bound")._told
    assert [entry for entry in told if entry[0] != "profile"] == [("clear", "TF32")]
    options = EngineOptions(cache_aliasing="bound")
    recipe = make_recipe(replace(written[1], options=options))
    assert "preview" not in recipe.command
    assert recipe.options == {"cache_aliasing": "bound"}


def test_single_tokens_and_chunks_are_the_two_profiles(written):
    single, chunk = (e[1]._shapes for e in compiled(written)._told if e[0] == "profile")
    assert single["input_ids"] == ((1, 1), (3, 1), (3, 1))
    assert chunk["input_ids"] == ((1, 1), (3, 7), (3, 7))
    assert chunk["past_key_values.1.key"] == ((1, 2, 14, 64), (3, 2, 14, 64), (3, 2, 14, 64))


def test_settings_reach_the_configuration(written, tmp_path):
    cache = tmp_path / "timing.cache"
    settings = {"workspace": "2M", "builder_optimization_level": 5, "timing_cache": cache}
    config = compiled(written, embed_plugin=True, **settings)
    assert ("pool", "WORKSPACE", 2 * 2**20) in config._told
    assert config.builder_optimization_level == 5
    assert config.plugins_to_serialize == [str(written[1].plugin_path.resolve())]
    assert cache.read_bytes() == b"+timed"
    compiled(written, timing_cache=cache)
    assert cache.read_bytes() == b"+timed+timed"
    assert [path.name for path in tmp_path.iterdir()] == ["timing.cache"]


def test_a_timing_cache_of_another_gpu_is_refused_and_left_alone(written, tmp_path):
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another GPU")
    with pytest.raises(EngineError, match=r"timing\.cache is not a timing cache of this GPU"):
        compiled(written, timing_cache=cache)
    assert cache.read_bytes() == b"of another GPU"
    with pytest.raises(EngineError, match="cannot read the timing cache"):
        compiled(written, timing_cache=tmp_path)


def test_a_network_without_the_plugin_in_every_layer_is_an_error(written):
    with pytest.raises(EngineError, match=r"has 0 layers of the LambdaAttention plugin.* has 2"):
        compiled(written, tensorrt_double(takes_nodes=False))


def test_a_release_whose_plugins_cannot_alias_is_refused():
    with pytest.raises(EngineError, match=r"tensorrt 10\.3\.0 has no plugins that update"):
        require_aliases(tensorrt_double(aliases=False))


def test_what_the_plugin_says_is_the_reason_and_not_the_parsers_line():
    error = SimpleNamespace(
        local_function_stack=list,
        node_name=lambda: "lambda_attention.0",
        node=lambda: 0,
        node_operator=lambda: "LambdaAttention",
        desc=lambda: "Assertion failed: plugin: Could not create the plugin.",
    )
    parser = SimpleNamespace(num_errors=1, get_error=lambda index: error)
    logged = ["noise", "LambdaAttention: head_dim = 72: the kernels take 32, 64"]
    assert compiler.parser_message(parser, logged) == (
        "the parser refuses node lambda_attention.0 (LambdaAttention): "
        "LambdaAttention: head_dim = 72: the kernels take 32, 64"
    )


def test_the_recipes_command_says_what_the_builder_is_told(written):
    options = EngineOptions(workspace="1G", builder_optimization_level=4, embed_plugin=True)
    recipe = make_recipe(replace(written[1], options=options))
    words = shlex.split(recipe.command)
    for word in (
        *("trtexec", "--onnx=engine.onnx", "--saveEngine=engine.plan", "--stronglyTyped"),
        *("--noTF32", "--preview=+aliasedPluginIO1003", "--memPoolSize=workspace:1024M"),
        *("--dynamicPlugins=./liblminf_tensorrt.so", "--builderOptimizationLevel=4"),
        "--setPluginsToSerialize=./liblminf_tensorrt.so",
    ):
        assert word in words
    assert "/" not in recipe.command.replace("./liblminf_tensorrt.so", "")
    # trtexec wants the three shapes of a profile right behind its number.
    at = words.index("--profile=1")
    shapes = [word.split("=")[0] for word in words[at : at + 4]]
    assert shapes == ["--profile", "--minShapes", "--optShapes", "--maxShapes"]
    assert "past_key_values.0.sink_value:3x2x3x64" in words[at + 3].split("=")[1].split(",")
    assert recipe.options == {"workspace": str(2**30), "builder_optimization_level": "4"}


def test_with_one_stream_the_command_names_only_what_is_open(tmp_path):
    bundle = TINY.write(tmp_path / "bundle")
    recipe = make_recipe(plugin_request(TINY, bundle, max_batch_size=1))
    assert recipe.command.endswith(
        "--profile=1 --minShapes=input_ids:1x1,logits_index:1x1 "
        "--optShapes=input_ids:1x7,logits_index:1x1 --maxShapes=input_ids:1x7,logits_index:1x7"
    )
    assert profiles(plugin_request(TINY, bundle, max_batch_size=1))[0]["batch"] == (1, 1, 1)


def test_a_task_with_options_survives_its_way_to_the_child(written, tmp_path):
    options = EngineOptions(workspace="3M", timing_cache="a/cache", embed_plugin=True)
    task = Task("tensorrt", replace(written[1], options=options), tmp_path, 10)
    assert Task.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workspace": "lots"}, "workspace='lots': must be a size"),
        ({"workspace": 0}, "workspace=0: must be at least 1"),
        ({"workspace": "-5M"}, "must be a size"),
        ({"builder_optimization_level": 6}, "builder_optimization_level=6: must be 0 … 5"),
        ({"builder_optimization_level": -1}, "must be at least 0"),
        ({"plugin": "none", "embed_plugin": True}, "embed_plugin: there is no plugin"),
    ],
)
def test_settings_out_of_their_rule_are_refused(settings, words):
    with pytest.raises(EngineError, match=words):
        EngineOptions(**settings)


def test_a_size_may_have_a_unit():
    sizes = ("512M", "512MiB", "2g", "100", 7, "3 KB")
    assert [EngineOptions(workspace=s).workspace for s in sizes] == [
        *(512 * 2**20, 512 * 2**20, 2 * 2**30, 100, 7, 3 * 2**10)
    ]


def test_the_library_built_or_installed_with_the_package_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = (Path("lib", plugin.PLUGIN_FILE), Path("build", plugin.PLUGIN_FILE))
    monkeypatch.setattr(plugin, "default_places", lambda: places)
    with pytest.raises(EngineError, match=r"is not at .*lib.* or .*build.*--plugin none"):
        plugin.find_plugin(EngineOptions())
    assert plugin.find_plugin(EngineOptions(), required=False) is None
    assert plugin.find_plugin(EngineOptions(plugin="none")) is None
    for place in reversed(places):
        place.parent.mkdir()
        place.write_bytes(b"\x7fELF getCreators LambdaAttention")
        assert plugin.find_plugin(EngineOptions()) == place


@pytest.mark.parametrize("content", [b"", b"\x7fELF of something else", b"getCreators"])
def test_a_file_that_is_not_the_plugin_is_refused_unread_by_any_loader(tmp_path, content):
    path = tmp_path / "some.so"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"some\.so is not the library of the LambdaAttention"):
        plugin.find_plugin(EngineOptions(plugin=path))
    with pytest.raises(EngineError, match="cannot read the plugin"):
        plugin.find_plugin(EngineOptions(plugin=tmp_path / "nothing.so"))


def test_a_head_dimension_without_kernels_is_known_before_the_export():
    assert plugin.head_dim_problem(TINY.layers) is None
    odd = TinyModel(head_dim=48).layers
    assert "head_dim 48: the plugin's kernels take 32, 64, 80" in plugin.head_dim_problem(odd)
    # The kernels say the same.
    kernels = (PLUGINS / "lambda_attention" / "validate.cpp").read_text(encoding="utf-8")
    *first, last = map(str, plugin.HEAD_DIMS)
    assert f"the kernels take {', '.join(first)} and {last}" in kernels


def test_only_tensorrt_proper_takes_a_plugin():
    assert tensorrt_builder.TAKES_PLUGIN
    assert not tensorrt_rtx.TAKES_PLUGIN


def test_a_library_the_builder_does_not_take_is_an_error(written):
    trt = tensorrt_double()
    trt.Builder.get_plugin_registry = lambda self: IPluginRegistry(lambda *_: None, loads=False)
    with pytest.raises(SessionError, match="TensorRT cannot load the plugin"):
        compiled(written, trt)


REAL = """
import json, logging, sys
from pathlib import Path
import tensorrt_bindings as trt
from tests.support.builder_doubles import DOUBLES, IBuilderConfig, written_here
from tests.support import tensorrt_doubles as session
from lminf_export.engine import compiler, settings
from lminf_export.engine.options import EngineOptions
from lminf_export.progress import silent
from lminf_export.runtime.engine import message_log
missing = []
for double in (*DOUBLES, session.ICudaEngine, session.IExecutionContext):
    real = dir(getattr(trt, double.__name__))
    missing += [f"{{double.__name__}}.{{n}}" for n in vars(double)
                if not n.startswith("_") and n not in real]
for enumeration, members in dict(PreviewFeature=["ALIASED_PLUGIN_IO_10_03"],
        LayerType=["PLUGIN_V3", "KV_CACHE_UPDATE"], MemoryPoolType=["WORKSPACE"],
        BuilderFlag=["TF32"], ExecutionContextAllocationStrategy=["USER_MANAGED"],
        NetworkDefinitionCreationFlag=["STRONGLY_TYPED"]).items():
    missing += [m for m in members if m not in getattr(trt, enumeration).__members__]
for name in ("deserialize_cuda_engine", "get_plugin_registry", "engine_host_code_allowed"):
    missing += [] if hasattr(trt.Runtime, name) else [name]
config = IBuilderConfig()
request = written_here(Path(sys.argv[1] if len(sys.argv) > 1 else {folder!r}))
settings.require_aliases(trt)
settings.apply(trt, config, request)
compiler._stay_in_full_precision(trt, config)
messages = message_log(trt, logging.getLogger("test"))
messages.log(trt.ILogger.Severity.ERROR, "oh")
monitor = compiler._progress_monitor(trt, silent)
writer = compiler._stream_writer(trt, open("/dev/null", "wb"))
print(json.dumps(dict(version=trt.__version__, missing=missing, told=config._told,
    errors=messages.errors, flags=compiler._creation_flags(trt), made=bool(monitor and writer),
    level=config.builder_optimization_level, embedded=config.plugins_to_serialize)))
"""


@bindings_folders
def test_the_doubles_and_every_name_we_use_exist_in_the_real_bindings(tmp_path, bindings):
    stubs = stub_libraries(bindings, tmp_path)
    done = run_python(REAL.format(folder=str(tmp_path)), bindings, library_path=stubs)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["missing"] == []
    assert said["told"] == [
        ["preview", "ALIASED_PLUGIN_IO_10_03", True],
        ["pool", "WORKSPACE", 4096],
        ["clear", "TF32"],
    ]
    assert (said["errors"], said["made"], said["level"]) == (["oh"], True, 2)
    # Numbered differently from release to release, which is why nothing here is a number.
    assert said["flags"] == (2 if said["version"].startswith("10.") else 1)
    assert said["embedded"] == [str((tmp_path / "lib.so").resolve())]
