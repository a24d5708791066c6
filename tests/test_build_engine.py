"""Engines are built on this machine, GPU or not, and a builder's failure is one clear error."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import onnx_ir as ir
import pytest

from lminf_export.engine import builders as lminf_build
from lminf_export.engine import child, compiler, tensorrt, tensorrt_rtx
from lminf_export.engine.builders import available_builders, build_engine, select_builder
from lminf_export.engine.common import profiles
from lminf_export.errors import EngineError
from lminf_export.export.engine_graph import write_engine_graph
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.progress import silent
from lminf_export.runtime.tensorrt import message_log
from tests.support.engine_graphs import request_of
from tests.support.rtx import RTX, needs_rtx
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(sliding_window=5, dtype="float16", head_dim=16)


def written(tiny, folder):
    """A bundle's folder and the request to build its engine, whose graph is written."""
    bundle = tiny.write(folder / "bundle")
    ready = bundle.path / "ready.onnx"
    request = request_of(tiny, bundle.path, onnx_path=ready, max_batch_size=3)
    write_engine_graph(bundle.graph_path, request)
    return bundle.path, request


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture
def parse(trt):
    """Parse a prepared graph with the real parser; (network, what must outlive it)."""

    def parse(path):
        messages = message_log(trt, logging.getLogger("test"))
        builder = trt.Builder(messages)
        network = builder.create_network(compiler._creation_flags(trt))
        parser = trt.OnnxParser(network, messages)
        return parser.parse_from_file(str(path)), network, parser, builder, messages

    return parse


@pytest.mark.sampled
@needs_rtx
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_plan_is_built_without_a_gpu(tmp_path, dtype):
    tiny = TinyModel(sliding_window=5, dtype=dtype, head_dim=16)
    folder, request = written(tiny, tmp_path)
    before = files(folder)
    engine = build_engine(RTX, request)
    assert files(folder) == sorted([*before, "engine.plan"])
    assert (folder / "engine.plan").stat().st_size > (folder / "model.onnx.data").stat().st_size
    assert (engine.builder, engine.dtype, engine.file) == (RTX, dtype, "engine.plan")
    assert engine.version == importlib.import_module("tensorrt_rtx").__version__
    assert engine.target == "sm_80+"
    assert engine.profiles == profiles(request)
    assert not engine.executed
    assert engine.note == "built, not executed here"


@pytest.mark.sampled
@needs_rtx
@pytest.mark.parametrize(
    "tiny",
    [
        TinyModel(num_sink_tokens=0, dtype="float16"),
        TinyModel(window_size=1, num_sink_tokens=2, chunk_size=1, dtype="float16"),
        TinyModel(window_size=3, num_sink_tokens=5, chunk_size=19, dtype="bfloat16"),
    ],
    ids=["no sinks", "window and chunk of one", "chunk and sinks above the window"],
)
def test_odd_settings_build_too(tmp_path, tiny):
    folder, request = written(tiny, tmp_path)
    build_engine(RTX, request)
    assert (folder / "engine.plan").exists()


@pytest.mark.slow
@needs_rtx
def test_an_exported_llama_becomes_a_bundle_with_a_plan(tmp_path):
    from lminf_export.export.run import export
    from tests.support.tiny_models import save_llama

    model = save_llama(tmp_path / "model", num_hidden_layers=2)
    told = []
    bundle = export(
        model,
        tmp_path / "out" / "engine.plan",
        window_size=11,
        chunk_size=7,
        builder=RTX,
        progress=lambda phase, fraction: told.append(phase),
    )
    steps = ["preparing the graph", "parsing the graph", "building the engine"]
    assert [phase for phase in dict.fromkeys(told) if phase in steps] == steps
    assert files(bundle.path) == sorted(["lminf.json", *bundle.manifest.files])
    assert bundle.plan_path is not None
    assert bundle.manifest.dtype == "float16"
    assert bundle.manifest.engine.profiles[1]["sequence"] == (1, 7, 7)


def test_every_ring_is_updated_in_place(tmp_path, trt, parse):
    folder, request = written(TINY, tmp_path)
    parsed, network, *keep = parse(folder / "ready.onnx")
    assert parsed
    compiler.check_network(trt, network, request)
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    assert kinds.count(trt.LayerType.KV_CACHE_UPDATE) == 2 * len(TINY.layers)
    del keep


def test_a_ring_that_would_be_copied_is_an_error(trt):
    updates = {"past_key_values.0.key": "present.0.key"}
    contract = GraphContract(TINY.layers, "float16", None, TINY.vocab_size)
    request = SimpleNamespace(contract=contract, with_plugin=False, updated_in_place=updates)
    types = {"int64": trt.DataType.INT64, "float16": trt.DataType.HALF}
    inputs = [
        SimpleNamespace(name=spec.name, dtype=types[spec.dtype]) for spec in contract.inputs()
    ]
    network = SimpleNamespace(num_inputs=len(inputs), get_input=inputs.__getitem__, num_layers=0)
    with pytest.raises(EngineError, match=r"1 of 1 caches .* past_key_values\.0\.key"):
        compiler.check_network(trt, network, request)


def test_the_profiles_reach_the_builder_for_every_input(tmp_path, trt):
    request = request_of(TINY, tmp_path, max_batch_size=3)
    builder = trt.Builder(message_log(trt, logging.getLogger("test")))
    ring = TINY.layers[0].ring_capacity
    single, chunk = (compiler._profile(builder, request, ranges) for ranges in profiles(request))
    assert [tuple(s) for s in chunk.get_shape("input_ids")] == [(1, 1), (3, 7), (3, 7)]
    assert [tuple(s) for s in single.get_shape("input_ids")] == [(1, 1), (3, 1), (3, 1)]
    assert [tuple(s) for s in chunk.get_shape("logits_index")] == [(1, 1), (3, 1), (3, 7)]
    cache = [tuple(s) for s in single.get_shape("past_key_values.0.key")]
    assert cache == [(1, 2, ring, 16), (3, 2, ring, 16), (3, 2, ring, 16)]


@needs_rtx
def test_progress_names_phases_and_fractions(tmp_path):
    _, request = written(TINY, tmp_path)
    told = []
    build_engine(RTX, request, lambda phase, fraction: told.append((phase, fraction)))
    phases = list(dict.fromkeys(phase for phase, _ in told))
    assert phases[:2] == ["parsing the graph", "building the engine"]
    assert len(phases) > 2
    fractions = [fraction for _, fraction in told if fraction is not None]
    assert 0 <= min(fractions) <= max(fractions) == 1


@needs_rtx
def test_the_builders_messages_go_to_the_log(tmp_path, caplog):
    _, request = written(TINY, tmp_path)
    with caplog.at_level(logging.INFO, "lminf_export.engine.builders"):
        build_engine(RTX, request)
    assert any("input_ids" in record.message for record in caplog.records)
    assert all(record.levelno <= logging.INFO for record in caplog.records)


def broken(folder):
    """Put a node nobody knows into the graph."""
    model = ir.load(folder / "model.onnx")
    logits = model.graph.outputs[0]
    old = logits.producer()
    node = ir.node("Mystery", [old.inputs[0]], domain="acme")
    node.outputs[0].name = "riddle"
    model.graph.insert_before(old, node)
    model.opset_imports["acme"] = 1
    old.replace_input_with(0, node.outputs[0])
    ir.save(model, folder / "model.onnx")


@needs_rtx
def test_what_the_parser_refuses_is_named(tmp_path):
    folder, request = written(TINY, tmp_path)
    broken(folder)
    write_engine_graph(folder / "model.onnx", request)
    before = files(folder)
    with pytest.raises(EngineError, match=r"node riddle \(Mystery\)") as caught:
        build_engine(RTX, request)
    assert "\n" not in str(caught.value)
    assert files(folder) == before


def test_an_unprepared_graph_is_refused_with_the_names_around_the_node(tmp_path, parse):
    folder, _ = written(TINY, tmp_path)
    parsed, _, parser, *keep = parse(folder / "model.onnx")
    assert not parsed
    message = compiler.parser_message(parser)
    assert "LambdaAttention" in message
    assert "(TensorScatter)" in message
    assert "circular" in message
    del keep


def test_the_reason_is_given_where_the_parsers_first_line_says_nothing(tmp_path, parse):
    folder, _ = written(TINY, tmp_path)
    model = ir.load(folder / "ready.onnx")
    ring = next(x for x in model.graph.inputs if x.name == "past_key_values.1.value")
    ring.shape = ir.Shape(["batch", 2, "ring", 16])
    ir.save(model, folder / "ready.onnx")
    parsed, _, parser, *keep = parse(folder / "ready.onnx")
    assert not parsed
    message = compiler.parser_message(parser)
    assert message.startswith("the parser refuses node present.1.value (TensorScatter): ")
    assert "static sequence length" in message
    assert "\n" not in message
    del keep


CRASHES = {
    "abort": ("import os; os.abort()", "crashed: SIGABRT"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "too little memory"),
    "quiet end": ("", "ended with status 0 before the plan was done"),
    "exception": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
}


@pytest.mark.parametrize("case", CRASHES)
def test_a_crash_of_the_builder_is_an_error_and_leaves_the_old_plan(tmp_path, case):
    code, words = CRASHES[case]
    request = request_of(TINY, tmp_path)
    request.plan_path.write_bytes(b"the old plan")
    # A builder that dies half-way has begun to write.
    begin = "import json, sys; task = json.loads(sys.stdin.readline());"
    begin += "open(task['partial_path'], 'wb').write(b'half'); "
    with pytest.raises(EngineError, match=words):
        child.build_in_child(RTX, request, command=[sys.executable, "-c", begin + code])
    assert files(tmp_path) == ["engine.plan"]
    assert request.plan_path.read_bytes() == b"the old plan"


def test_an_interrupted_build_leaves_neither_files_nor_a_process(tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen

    def remember(*arguments, **settings):
        started.append(real(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)

    def interrupt(phase, fraction):
        raise KeyboardInterrupt

    code = 'import time; print(\'["progress", "x", null]\', flush=True); time.sleep(600)'
    with pytest.raises(KeyboardInterrupt):
        child.build_in_child(
            RTX, request_of(TINY, tmp_path), interrupt, command=[sys.executable, "-c", code]
        )
    assert started[0].poll() is not None
    assert files(tmp_path) == []


@needs_rtx
def test_a_worker_nobody_waits_for_ends_by_itself(tmp_path):
    folder, request = written(TINY, tmp_path)
    before = files(folder)
    task = child.Task(RTX, request, folder / "half", logging.WARNING)
    worker = subprocess.run(
        child.WORKER,
        input=task.to_json() + "\n",
        env=child._environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert worker.returncode == 1
    assert '"done"' not in worker.stdout
    assert files(folder) == before


@needs_rtx
def test_a_full_disk_is_one_clear_error(tmp_path):
    _, request = written(TINY, tmp_path)
    full = tmp_path.__class__("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    task = child.Task(RTX, request, full, logging.WARNING)
    with pytest.raises(EngineError, match=r"cannot write .*engine\.plan: No space left"):
        child._run(child.WORKER, task, silent)


@needs_rtx
def test_a_missing_folder_is_one_clear_error(tmp_path):
    _, request = written(TINY, tmp_path)
    request = replace(request, plan_path=tmp_path / "nowhere" / "engine.plan")
    with pytest.raises(EngineError, match="No such file or directory"):
        build_engine(RTX, request)


def test_a_task_survives_its_way_to_the_child(tmp_path):
    request = request_of(TINY, tmp_path)
    task = child.Task(RTX, request, tmp_path / "a", logging.INFO)
    assert child.Task.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("installed", "asked", "chosen"),
    [
        ({"tensorrt_rtx"}, None, RTX),
        ({"tensorrt"}, None, "tensorrt"),
        ({"tensorrt", "tensorrt_rtx"}, RTX, RTX),
        ({"tensorrt", "tensorrt_rtx"}, "tensorrt", "tensorrt"),
    ],
)
def test_the_builder_that_is_installed_or_named_is_chosen(monkeypatch, installed, asked, chosen):
    monkeypatch.setattr(
        lminf_build.importlib.util, "find_spec", lambda name: name in installed or None
    )
    assert select_builder(asked) == chosen


@pytest.mark.parametrize(
    ("installed", "asked", "words"),
    [
        (set(), None, r"pip install 'lminf-export\[rtx\]'"),
        ({"tensorrt", "tensorrt_rtx"}, None, "say which with --builder"),
        ({"tensorrt_rtx"}, "tensorrt", "'tensorrt' is not installed"),
        (set(), RTX, r"pip install 'lminf-export\[rtx\]'"),
        ({"tensorrt_rtx"}, "tvm", "must be one of tensorrt, tensorrt-rtx, none"),
    ],
)
def test_a_choice_that_cannot_be_made_says_what_to_do(monkeypatch, installed, asked, words):
    monkeypatch.setattr(
        lminf_build.importlib.util, "find_spec", lambda name: name in installed or None
    )
    with pytest.raises(EngineError, match=words):
        select_builder(asked)


def test_installed_builders_are_found_without_importing_them():
    code = (
        "import sys; from lminf_export.engine.builders import available_builders as b; b();"
        "sys.exit(bool({'tensorrt', 'tensorrt_rtx', 'torch'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=child._environment())
    assert set(available_builders()) <= {"tensorrt", RTX}


def test_both_builder_modules_have_one_shape():
    for module in (tensorrt, tensorrt_rtx):
        for name in (
            *("NAME", "PACKAGE", "INSTALL", "TAKES_PLUGIN"),
            *("build", "require_machine", "target"),
        ):
            assert hasattr(module, name)


def test_tensorrt_proper_asks_for_a_gpu_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: "no NVIDIA driver is installed")
    with pytest.raises(EngineError, match=r"no NVIDIA driver is installed.*tensorrt-rtx"):
        tensorrt.build(request_of(TINY, tmp_path))


def test_a_release_without_cache_updates_is_refused():
    old = SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
    request = SimpleNamespace(with_plugin=False)
    with pytest.raises(EngineError, match=r"tensorrt 10\.3\.0 has no cache updates"):
        compiler._require_features(old, request)


def test_float32_products_are_not_rounded_to_tf32(trt):
    builder = trt.Builder(message_log(trt, logging.getLogger("test")))
    config = builder.create_builder_config()
    compiler._stay_in_full_precision(trt, config)
    assert not config.get_flag(trt.BuilderFlag.TF32)


def test_only_outer_phases_are_told():
    tree = compiler.PhaseTree()
    assert tree.start("all", None, 2)
    assert tree.start("part", "all", 200)
    assert tree.start("piece", "part", 2)
    assert not tree.start("crumb", "piece", 2)
    assert tree.step("part", 0) is None  # half a per cent
    assert tree.step("part", 1) == 0.01
    assert tree.step("crumb", 0) is None
    assert tree.step("piece", 1) == 1
    assert tree.step("never begun", 0) is None
