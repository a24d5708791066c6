"""Whether caches are updated in place is asked of the plugin, and said if they are not.

The plugin's own record (plugins/tensorrt/cache_use.cpp) is compiled and loaded; the engine is a
double that gives it the addresses which an engine would.
"""

from __future__ import annotations

import ctypes
import json
import logging
import subprocess
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from lminf_export.bench import measure
from lminf_export.bench.report import FirstToken, Memory
from lminf_export.cli.bench import bench_command
from lminf_export.engine.options import EngineOptions
from lminf_export.errors import EngineError
from lminf_export.operator import contract
from lminf_export.runtime.cache_use import CacheRecorder, CacheUse, cache_use, find_recorder
from lminf_export.runtime.language_model import LanguageModel
from tests.support.plugin_build import needs_compiler, recording_library
from tests.support.tensorrt_doubles import TINY, Setup, bundle_with_plan

KINDS = ("key", "value", "sink_key", "sink_value")
LOGGER = "lminf_export.runtime.tensorrt"
ELSEWHERE = 1 << 40  # an address no session has


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return recording_library(tmp_path_factory.mktemp("recording"))


class Engine:
    """A session over an engine's double that tells the library of its caches, layer by layer.

    change: from the addresses of one cache, its past and its present, to what the plugin is given.
    """

    def __init__(self, folder, monkeypatch, library, change=lambda *pair: pair, **options):
        self.setup = Setup(
            folder, monkeypatch, plugin="beside", content=library.read_bytes(), **options
        )
        # What TensorRT does when it is given the library.
        self.loaded = ctypes.CDLL(str(self.setup.bundle.plugin_path.resolve()))
        self.change, self.session = change, self.setup.open()
        self.setup.engine._enqueued = self.enqueue

    def enqueue(self, addresses):
        inputs, outputs = contract.input_names(), contract.output_names()
        for layer, spec in enumerate(TINY.manifest().layers):
            given = (ctypes.c_void_p * len(inputs))(), (ctypes.c_void_p * len(outputs))()
            # Without sink tokens its sinks are a constant, past and present at odd addresses.
            for kind in KINDS if spec.num_sink_tokens else KINDS[:2]:
                name = f"{layer}.{kind}"
                pair = addresses[f"past_key_values.{name}"], addresses[f"present.{name}"]
                past, present = self.change(*pair)
                given[0][inputs.index(f"past_{kind}")] = past
                given[1][outputs.index(f"present_{kind}")] = present
            sinks = ctypes.c_int64(spec.num_sink_tokens)
            self.loaded.pretendStep(*given, len(outputs), sinks)

    def read(self, *widths):
        lm = LanguageModel(self.setup.bundle, self.session)
        state = lm.new_state(2)
        for width in widths:
            lm.forward(np.zeros((2, width), np.int64), state)
        return self.session.cache_use


CACHES = len(list(TINY.manifest().contract.caches(present=False)))


@needs_compiler
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_an_engine_that_copies_nothing_says_nothing(
    tmp_path, monkeypatch, library, caplog, cuda_graphs
):
    engine = Engine(tmp_path, monkeypatch, library)
    if not cuda_graphs:
        engine.session = engine.setup.open(cuda_graphs=False)
        engine.setup.engine._enqueued = engine.enqueue
    assert engine.session.cache_use is None
    assert engine.read(1, 7, 1, 1) == CacheUse(CACHES, 0, 0)
    assert engine.session.cache_use.description == f"all {CACHES} in place"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# How TensorRT may copy → what the plugin sees, and the words for it.
COPIES = {
    "a present of its own": (
        lambda past, present: (past, present + ELSEWHERE),
        CacheUse(CACHES, CACHES, 0),
        f"0 of {CACHES} in place, {CACHES} copied by the plugin",
    ),
    "a past of its own": (
        lambda past, present: (past + ELSEWHERE, present),
        CacheUse(CACHES, CACHES, 0),
        f"0 of {CACHES} in place, {CACHES} copied by the plugin",
    ),
    "both one tensor of its own": (
        lambda past, present: (past + ELSEWHERE, present + ELSEWHERE),
        CacheUse(CACHES, 0, CACHES),
        f"0 of {CACHES} in place, {CACHES} copied by TensorRT",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", COPIES)
def test_copies_are_said_once_for_each_kind_of_step(tmp_path, monkeypatch, library, caplog, name):
    change, wanted, words = COPIES[name]
    engine = Engine(tmp_path, monkeypatch, library, change)
    assert engine.read(1, 7, 1, 1, 7) == wanted
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [words in text for text in said] == [True, True]
    assert "every step of single tokens" in said[0]
    assert "every step of a chunk" in said[1]
    assert all("build it again with --cache-aliasing bound" in text for text in said)


@needs_compiler
def test_the_other_way_is_named_where_this_one_copies(tmp_path, monkeypatch, library, caplog):
    change = COPIES["a past of its own"][0]
    engine = Engine(tmp_path, monkeypatch, library, change, cache_aliasing="bound")
    engine.read(1)
    (said,) = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "build it again with --cache-aliasing declared" in said


@needs_compiler
def test_only_the_copied_caches_are_counted(tmp_path, monkeypatch, library):
    first = []

    def change(past, present):
        first.append(past)
        return (past, present + ELSEWHERE) if past == first[0] else (past, present)

    engine = Engine(tmp_path, monkeypatch, library, change)
    assert engine.read(1) == CacheUse(CACHES, 1, 0)
    # A later chunk of this state is judged by itself; the worst is what is told.
    assert engine.read(7).in_place == CACHES - 1


def test_a_library_that_cannot_tell_is_no_error(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    setup = Setup(tmp_path, monkeypatch, plugin="beside")
    lm = LanguageModel(setup.bundle, setup.open())
    lm.forward(np.zeros((1, 1), np.int64), lm.new_state(1))
    assert lm.session.cache_use is None
    assert "will not be known: TensorRT has loaded the plugin from another place" in caplog.text


def test_a_plugin_inside_the_plan_cannot_be_asked(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    assert Setup(tmp_path, monkeypatch, plugin="embedded").open().cache_use is None
    assert "will not be known: the plugin is inside the plan" in caplog.text


@needs_compiler
def test_a_library_of_before_is_named(tmp_path):
    source = tmp_path / "old.c"
    source.write_text("int getCreators;", encoding="utf-8")
    library = tmp_path / "old.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert find_recorder(library) == "TensorRT has loaded the plugin from another place"
    kept = ctypes.CDLL(str(library))
    assert find_recorder(library) == "the plugin was built before it could tell"
    del kept


@needs_compiler
def test_each_thread_records_its_own_steps(library):
    loaded = ctypes.CDLL(str(library))
    loaded.lminfCachesInPlace.restype = loaded.lminfCachesApart.restype = ctypes.c_uint64
    recorder = CacheRecorder(loaded)
    before = loaded.lminfCachesInPlace(), loaded.lminfCachesApart()
    inputs, outputs = contract.input_names(), contract.output_names()
    steps, found = 500, {}

    def step(address, apart):
        given = (ctypes.c_void_p * len(inputs))(), (ctypes.c_void_p * len(outputs))()
        for place, kind in enumerate(KINDS[:2]):
            given[0][inputs.index(f"past_{kind}")] = address + place
            given[1][outputs.index(f"present_{kind}")] = address + place + apart
        loaded.pretendStep(*given, len(outputs), ctypes.c_int64(0))

    def work(address, apart):
        with recorder.recorded(2 * steps) as seen:
            for _ in range(steps):
                step(address, apart)
        found[address] = seen

    threads = [threading.Thread(target=work, args=(1000 * n, n % 2)) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(1, 6):
        a = 1000 * n
        assert found[a] == [(a, a + n % 2), (a + 1, a + 1 + n % 2)] * steps
    after = loaded.lminfCachesInPlace(), loaded.lminfCachesApart()
    assert [b - a for a, b in zip(before, after, strict=True)] == [2 * 2 * steps, 3 * 2 * steps]
    step(1, 0)  # nobody records: nothing is written
    assert len(found[1000]) == 2 * steps


@needs_compiler
def test_more_caches_than_expected_are_seen_and_not_judged(library):
    loaded = ctypes.CDLL(str(library))
    recorder = CacheRecorder(loaded)
    given = (ctypes.c_void_p * 17)(), (ctypes.c_void_p * 5)()
    with recorder.recorded(3) as seen:
        loaded.pretendStep(*given, 5, ctypes.c_int64(1))
    assert len(seen) == len(KINDS)
    assert cache_use(seen, [1, 2, 3]) is None
    assert cache_use([], [1, 2, 3]) is None


def test_cache_aliasing_is_a_setting_of_the_plugin():
    with pytest.raises(EngineError, match="cache_aliasing='odd': must be one of declared, bound"):
        EngineOptions(cache_aliasing="odd")
    with pytest.raises(EngineError, match="cache_aliasing='bound': is a setting of the plugin"):
        EngineOptions(plugin="none", cache_aliasing="bound")
    assert EngineOptions().described() == {}
    assert EngineOptions(cache_aliasing="bound").described() == {"cache_aliasing": "bound"}


@needs_compiler
@pytest.mark.parametrize(
    ("name", "words"),
    [(None, f"all {CACHES} in place"), *((name, row[2]) for name, row in COPIES.items())],
)
def test_bench_runs_a_plan_and_shows_what_its_caches_did(
    tmp_path, monkeypatch, library, name, words
):
    engine = Engine(tmp_path, monkeypatch, library, *([COPIES[name][0]] if name else []))
    monkeypatch.setattr(
        measure, "load", lambda path, **settings: LanguageModel(engine.setup.bundle, engine.session)
    )
    # A process of its own has no doubles.
    asked = []
    fresh = FirstToken(1.0, 0.1, 0.2, 0.3, 0.1), Memory(1, 2, 3)
    monkeypatch.setattr(measure, "fresh_process", lambda *told: asked.append(told[0]) or fresh)
    plan = engine.setup.bundle.plan_path
    words_of_command = [plan, "--batch-sizes", "1,3", "--prefill-tokens", 9, "--decode-tokens", 5]
    result = CliRunner().invoke(bench_command, [*map(str, words_of_command), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert asked == [plan]
    assert report["cache_updates"] == words
    assert report["provider"] == "tensorrt"
    assert report["bandwidth"] > 0
    assert {row["batch_size"] for row in report["decode"]} == {1, 3}


def test_bench_refuses_a_profile_of_a_plan(tmp_path):
    bundle, _ = bundle_with_plan(tmp_path, plugin="beside")
    result = CliRunner().invoke(bench_command, [str(bundle.plan_path), "--profile"])
    assert result.exit_code == 2
    assert "profile: is of onnxruntime's operators" in result.output
