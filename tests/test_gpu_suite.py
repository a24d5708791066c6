"""scripts/gpu_suite.py without a GPU: its plan, its steps on the block emulation, its page."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from scripts import gpu_suite
from scripts.gpu import (
    kernel_steps,
    layer_steps,
    record,
    report,
    steps,
    timings,
    tool_steps,
    workloads,
    yardsticks,
)
from scripts.gpu.counters import by_kernel, read_details
from scripts.gpu.cuda_device import CudaDevice
from scripts.gpu.emulated_device import TimedEmulation
from scripts.gpu.kernel_library import KernelLibrary
from scripts.gpu.plan import BY_DEFAULT, PLAN, groups
from scripts.gpu.processes import run_step
from scripts.gpu.suite import Suite
from scripts.gpu.workloads import Workload, small_workload
from tests.support import kernel_build

needs_compiler = pytest.mark.skipif(
    kernel_build.compiler() is None, reason=kernel_build.NO_COMPILER
)
# What a bare machine with torch lacks (README.md of scripts lists what it has).
ABSENT = ("pydantic", "click", "pytest", "transformers", "onnx", "onnxruntime", "pynvml")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return kernel_build.emulated_library(kernel_build.shared_folder(tmp_path_factory))


@pytest.fixture
def suite(library):
    return Suite(TimedEmulation(), library.parent, KernelLibrary(library), True, True)


def without(folder, modules):
    """A folder for PYTHONPATH whose Python has none of some modules."""
    blocked = ", ".join(map(repr, modules))
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import sys

            class Absent:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in ({blocked},):
                        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

            sys.meta_path.insert(0, Absent())
        """)
    )
    return folder


def test_a_dry_run_names_every_step(capsys):
    assert gpu_suite.main(["--dry-run", "--only", *PLAN]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in PLAN)
    assert "sanitizer" not in BY_DEFAULT


def test_every_planned_step_exists():
    assert set(steps.STEPS) == {"machine", *PLAN}


def test_steps_that_measure_time_run_alone():
    found = groups(["timing", "correctness", "build", "int8_rings", "graph_capture"])
    assert found == [["build"], ["graph_capture", "correctness", "int8_rings"], ["timing"]]


def test_every_call_of_the_default_steps_ends_within_its_limit():
    """Ten minutes is what a borrowed machine gives a command; steps are resumed after that."""
    assert all(step.limit <= 570 for step in PLAN.values())


def test_without_a_gpu_the_suite_says_so_and_exits_with_2(capfd, tmp_path):
    assert gpu_suite.main(["--results", str(tmp_path)]) == 2
    assert "no GPU" in capfd.readouterr().err


@needs_compiler
@pytest.mark.slow
def test_the_suite_runs_on_a_bare_machine_and_goes_on_where_it_stopped(library, tmp_path):
    """With torch and nothing else of what this project needs, each step in its own process."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    results = tmp_path / "results"
    chosen = [
        "correctness", "tall_kernel", "last_block", "int8_rings", "repeatability", "layers",
        "harness", "onnxruntime", "timing",
    ]  # fmt: skip
    command = [
        sys.executable, str(kernel_build.ROOT / "scripts" / "gpu_suite.py"), "--emulate", "--quick",
        "--library", str(library), "--results", str(results), "--build", str(tmp_path / "build"),
        "--only", "graph_capture", "hopper_kernel", "choices", "kernel_times", "counters",
        "tensorrt_rtx", *chosen,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(without(blocked, ABSENT))}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (written,) = results.glob("gpu-*.json")
    found = json.loads(written.read_text())["steps"]
    ran = {*chosen, "choices"} - {"harness", "onnxruntime"}
    assert {name for name, step in found.items() if step["status"] == "ok"} == ran
    assert {step["status"] for name, step in found.items() if name not in ran} == {"not run"}
    assert "no module onnx" in found["onnxruntime"]["reason"]
    assert "tiles_tall" in found["tall_kernel"]["kernels"]
    assert found["correctness"]["largest_error_in_units_of_torchs"] <= kernel_steps.LARGEST_RATIO
    (small,) = found["timing"]["workloads"]
    assert set(small["times_faster_than"]) == {yardsticks.SDPA, yardsticks.FULL, timings.INT8}
    assert small["failed"] == {}
    (compared,) = found["choices"]["workloads"]
    tried = {"chosen", "1 splits", "2 splits, combined in the last block"}
    assert tried <= set(compared["seconds"])
    assert compared["failed"] == {}
    page = (results / "gpu.md").read_text()
    assert "| correctness | ok |" in page
    assert "| small |" in page

    again = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0
    assert "timing" not in again.stderr  # what was right is not run again
    assert "harness: not run" in again.stderr


def test_what_was_recorded_holds_for_the_same_sources_and_thoroughness():
    step = {"status": "ok", "sources": "abc", "quick": False}
    assert record.holds(step, "abc", quick=False)
    assert record.holds(step, "abc", quick=True)
    assert not record.holds({**step, "quick": True}, "abc", quick=False)
    assert not record.holds({**step, "status": "failed"}, "abc", quick=False)
    assert not record.holds(step, "abd", quick=False)
    assert not record.holds(None, "abc", quick=True)


def test_the_digest_follows_the_kernels(tmp_path):
    for source in record.SOURCES:
        place = tmp_path / source
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix:
            place.write_text("")
        else:
            place.mkdir()
    kernel = tmp_path / "plugins" / "decode.cuh"
    kernel.write_text("a")
    first = record.digest(tmp_path)
    kernel.write_text("b")
    assert record.digest(tmp_path) != first


@pytest.mark.slow
def test_a_step_that_does_not_end_is_ended_and_keeps_what_it_found(tmp_path, monkeypatch):
    from scripts.gpu import processes

    monkeypatch.setattr(processes, "ROOT", stand_in(tmp_path, "keep(out); time.sleep(60)"))
    found = run_step("timing", 2.0, tmp_path, ["--build", "b"])
    assert found["status"] == "failed"
    assert "ended after 2 s" in found["reason"]
    assert found["workloads"] == ["first"]


def test_a_step_that_dies_says_how(tmp_path, monkeypatch):
    from scripts.gpu import processes

    monkeypatch.setattr(
        processes, "ROOT", stand_in(tmp_path, "print('so', flush=True); os._exit(7)")
    )
    found = run_step("timing", 20.0, tmp_path, ["--build", "b"])
    assert found["status"] == "failed"
    assert found["reason"].endswith("ended with status 7: so")


def stand_in(folder, does):
    """A checkout whose only step does something else."""
    package = folder / "checkout" / "scripts" / "gpu"
    package.mkdir(parents=True)
    (package / "one_step.py").write_text(
        "import json, os, sys, time\n"
        "def keep(path):\n"
        "    open(path, 'w').write(json.dumps({'workloads': ['first']}))\n"
        f"out = sys.argv[sys.argv.index('--out') + 1]\n{does}\n"
    )
    return folder / "checkout"


@needs_compiler
def test_wrong_kernels_fail_the_suite(suite, monkeypatch):
    monkeypatch.setattr(kernel_steps, "LARGEST_RATIO", 1e-3)
    monkeypatch.setattr(kernel_steps, "all_streams", lambda quick: few_streams())
    found = steps.perform("correctness", suite)
    assert found["status"] == "failed"
    assert found["failures"][0]["stream"] == "laps-float16"


@needs_compiler
def test_one_stream_that_cannot_run_does_not_hide_the_others(suite, monkeypatch):
    first, second = few_streams()
    bad = replace(first, case=first.case.with_(head_dim=72, rotary_dim=72))
    monkeypatch.setattr(kernel_steps, "all_streams", lambda quick: [bad, second])
    found = steps.perform("correctness", suite)
    (failure,) = found["failures"]
    assert failure["stream"] == bad.name
    assert "head" in failure["error"]
    assert found["largest_error_in_units_of_torchs"] > 0  # of the second


@needs_compiler
def test_a_lost_device_ends_a_step_and_names_what_did_not_run(suite, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def broken(*_arguments, **_names):
        monkeypatch.setattr(TimedEmulation, "synchronize", lambda self: lost())
        lost()

    monkeypatch.setattr(kernel_steps, "all_streams", lambda quick: few_streams())
    monkeypatch.setattr(KernelLibrary, "launch", broken)
    found = steps.perform("correctness", suite)
    stream, rest = found["failures"]
    assert stream["error"].endswith("an illegal memory access was encountered")
    assert rest == {"not run": 1, "error": "the device is lost"}


NCU = """
[17] python3.12@127.0.0.1
  void decodeKernel<Half, Half, 128, 1>(KernelArguments) (8, 33, 1)x(128, 1, 1), Context 1, Stream 7
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    SM Frequency                    Ghz         1.87
    Elapsed Cycles                cycle       22,995
    Duration                         us        12.29
    Memory Throughput                 %        28.69
    OPT   This workload exhibits low compute throughput
    Memory Throughput                          Tbyte/s         1.37
    Registers Per Thread             register/thread              164

  void combineKernel<Half, 128>(KernelArguments) (32, 1, 1)x(256, 1, 1), Context 1, Stream 7
    Duration                         ns        1,960
  void decodeKernel<Half, Half, 128, 1>(KernelArguments) (8, 33, 1)x(128, 1, 1), Context 1, Stream 7
    Duration                         us        12.31
  void decodeKernel<Half, Half, 128, 1>(KernelArguments) (8, 33, 1)x(128, 1, 1), Context 1, Stream 7
    Duration                         us        99.00
"""


def test_counters_are_read_off_what_ncu_prints():
    decode, combine = by_kernel(read_details(NCU))
    assert (decode["kernel"], decode["of"]) == ("decodeKernel", "Half, Half, 128, 1")
    assert (decode["grid"], decode["block"], decode["launches"]) == ([8, 33, 1], [128, 1, 1], 3)
    assert decode["seconds"] == pytest.approx(12.31e-6)
    assert decode["memory_bytes_per_second"] == pytest.approx(1.37e12)
    assert decode["registers"] == 164
    assert "memory_busy" not in decode  # a share of some memory is not the DRAM's
    assert combine["seconds"] == pytest.approx(1.96e-6)


def few_streams():
    return kernel_steps.streams.lap_streams(kernel_steps.torch.float16)[:2]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError(), ZeroDivisionError("why\nthere")])
def test_any_error_of_a_step_becomes_its_result(tmp_path, monkeypatch, error):
    def fail(_suite):
        raise error

    monkeypatch.setitem(steps.STEPS, "timing", fail)
    found = steps.perform("timing", Suite(TimedEmulation(), tmp_path))
    assert found["status"] == "failed"
    assert found["reason"].startswith(type(error).__name__)
    assert "\n" not in found["reason"]
    assert any("fail" in line for line in found["where"])


@needs_compiler
def test_a_contestant_that_fails_is_named_and_the_others_are_timed(suite, monkeypatch):
    def absent(*_arguments):
        raise ImportError

    monkeypatch.setattr(yardsticks, "_sdpa", absent)
    found = timings.measure(suite.kernels(), suite.device, small_workload())
    assert found["failed"] == {yardsticks.SDPA: "ImportError", yardsticks.FULL: "ImportError"}
    assert yardsticks.COPY in found["seconds"]


@needs_compiler
def test_an_output_that_changes_between_launches_fails_the_suite(library):
    class Unsteady(KernelLibrary):
        launches = 0

        def launch(self, params, workspace, stream=0, choices=timings.CHOSEN_BY_PLAN):
            super().launch(params, workspace, stream, choices)
            self.launches += 1
            ctypes.memset(params.output, self.launches, 1)

    suite = Suite(TimedEmulation(), library.parent, Unsteady(library), True, True)
    found = steps.perform("repeatability", suite)
    assert (found["status"], found["changed"]) == ("failed", ["small"])


@needs_compiler
def test_a_layer_that_another_one_changes_fails_the_suite(library):
    class Careless(KernelLibrary):
        """The first layer's output is the last one's scratch."""

        workspace = None

        def launch(self, params, workspace, stream=0, choices=timings.CHOSEN_BY_PLAN):
            super().launch(params, workspace, stream, choices)
            if workspace is not self.workspace:  # other layers, and those before are freed
                self.workspace, self.outputs = workspace, []
            self.outputs.append(params.output)
            if len(self.outputs) > 2 * layer_steps.LAYERS_WHEN_QUICK:
                ctypes.memset(self.outputs[0], len(self.outputs) % 100, 4)

    suite = Suite(TimedEmulation(), library.parent, Careless(library), True, True)
    found = steps.perform("layers", suite)
    assert found["status"] == "failed"
    assert "small, as planned, plain" in found["changed"]


def preferences_that_launch(monkeypatch):
    ran = []
    launch = KernelLibrary.launch

    def record(self, *arguments, **words):
        ran.append(self.preference)
        launch(self, *arguments, **words)

    monkeypatch.setattr(KernelLibrary, "launch", record)
    return ran


@needs_compiler
def test_layers_are_repeated_by_the_kernel_of_the_device_too(library, monkeypatch):
    ran = preferences_that_launch(monkeypatch)
    for device, preferences in (
        (TimedEmulation(), ["portable"]),
        (TimedEmulation(shared_bytes=232448, hopper=True), ["portable", "hopper"]),
    ):
        ran.clear()
        kernels = KernelLibrary(library)
        device.configure(kernels)
        found = steps.perform("repeatability", Suite(device, library.parent, kernels, True, True))
        assert (found["status"], found["layers"]) == ("ok", len(preferences))
        assert ran == [name for name in preferences for _ in range(kernel_steps.REPEATS)]
    TimedEmulation().configure(kernels)


@needs_compiler
def test_chunks_are_repeated_by_warps_of_32_rows_too(library, monkeypatch):
    ran = preferences_that_launch(monkeypatch)
    monkeypatch.setattr(workloads, "small_workload", lambda: replace(small_workload(), steps=19))
    suite = Suite(TimedEmulation(), library.parent, KernelLibrary(library), True, True)
    found = steps.perform("repeatability", suite)
    assert (found["status"], found["layers"]) == ("ok", 2)
    assert set(ran) == {"portable", "tall"}


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 19])
def test_chunks_are_timed_by_warps_of_32_rows_too(suite, tokens):
    workload = replace(small_workload(), steps=tokens, full_context=0)
    found = timings.measure(suite.kernels(), suite.device, workload)
    assert (timings.TALL in found["seconds"]) == (tokens > 1)
    assert timings.TALL not in found["failed"]


@needs_compiler
def test_the_sanitizer_looks_at_every_kernel_of_the_device(library, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        'for word; do case "$out" in next) out=$word;; esac; '
        'case "$word" in --out) out=next;; esac; done\n'
        f'echo "$@" >> {tmp_path}/said\necho \'{{"status": "ok"}}\' > "$out"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for hopper, step in ((False, "correctness"), (True, "hopper_kernel")):
        device = TimedEmulation(hopper=hopper)
        suite = Suite(device, library.parent, KernelLibrary(library), quick=True)
        assert steps.perform("sanitizer", suite)["status"] == "ok"
        looked_at = itertools.product(
            tool_steps.SANITIZER_TOOLS, (step, "tall_kernel", "last_block")
        )
        wanted = [(f"--tool {name} ", f"one_step {which} --quick") for name, which in looked_at]
        said = (tmp_path / "said").read_text().splitlines()[-len(wanted) :]
        for line, words in zip(said, wanted, strict=True):
            assert all(word in line for word in words)


def test_a_step_that_cannot_run_says_what_is_missing(tmp_path):
    suite = Suite(TimedEmulation(), tmp_path)
    assert steps.perform("correctness", suite) == {
        "status": "not run", "reason": "the kernels were not built",
    }  # fmt: skip


def test_a_decode_step_reads_what_its_window_and_sinks_hold():
    workload = Workload("w", batch=8, heads=32, kv_heads=8)
    assert workload.key_bytes == 8 * 8 * (4096 + 16) * 128 * 2 * 2


def test_the_page_says_not_yet_measured_until_a_gpu_has_written_it(tmp_path):
    assert report.results_in(tmp_path) == []
    page = report.empty_page()
    assert "not yet measured" in page
    assert page.split("\n\n")[1] == report.NEVER_RUN


def test_the_page_says_first_whether_the_kernels_of_now_have_run():
    result = {
        "environment": {"gpu": "G", "versions": {"torch": "2"}},
        "steps": {"build": {"status": "ok", "sources": "1"}},
    }  # fmt: skip
    assert report.page([result], "1").split("\n\n")[1] == report.RUN
    assert report.page([result], "2").split("\n\n")[1] == report.RUN_BEFORE
    result["steps"]["timing"] = {"status": "ok", "sources": "2"}
    assert report.page([result], "2").split("\n\n")[1] == report.RUN_IN_PART


def test_the_page_compares_choices_and_takes_a_plan_that_was_timed_alone():
    both = {"chosen": 3e-6, "2 splits": 2e-6, "append kernel": 4e-6}
    workloads = [
        {"workload": name, "kernel": "decode8", "planned_splits": 5, "seconds": seconds}
        for name, seconds in (("fits", both), ("fills the memory", {"chosen": 3e-6}))
    ]
    step = {"status": "failed", "sources": "0", "workloads": workloads}
    environment = {"gpu": "G", "versions": {"torch": "2"}}
    page = report.page([{"environment": environment, "steps": {"choices": step}}], "0")
    assert "| fits | decode8 | 5 | 3.0 | 2 splits | 2.0 | append kernel: 4.0 |" in page
    assert "| fills the memory | decode8 | 5 | 3.0 |  |  |  |" in page


def test_work_is_prepared_behind_what_fills_its_tensors(monkeypatch):
    """A length that is read before it is written may be any number."""
    done = []

    class Stream:
        def wait_stream(self, other):
            done.append(f"wait for {other}")

        def synchronize(self):
            done.append("synchronize")

    fakes = {
        "Stream": Stream, "current_stream": lambda: "the current one", "CUDAGraph": object,
        "stream": lambda _: contextlib.nullcontext(), "graph": lambda _: contextlib.nullcontext(),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    CudaDevice("cuda", 132, 233472, 0).prepared(lambda: done.append("work"))
    assert done == ["wait for the current one", *["work"] * 3, "synchronize", "work"]


TRITON = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from scripts.gpu.triton_kernels import Decode, copy
source = torch.randn(10_000).half()
target = torch.zeros_like(source)
copy(source, target)
assert torch.equal(source, target)
for batch, heads, groups, keys, dim in ((1, 8, 2, 300, 64), (2, 4, 4, 130, 128)):
    query = torch.randn(batch, heads, 1, dim).half()
    key, value = (torch.randn(batch, groups, keys, dim).half() for _ in range(2))
    found = Decode(batch, heads, groups, keys, dim, 4)(query, key, value)
    wanted = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), enable_gqa=True
    )
    assert (found.double() - wanted).abs().max() < 1e-3
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton: its yardsticks are not tried"
)
def test_the_yardsticks_in_triton_compute_what_they_are_compared_for():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRITON]
    done = subprocess.run(
        command, env=environment, cwd=kernel_build.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
