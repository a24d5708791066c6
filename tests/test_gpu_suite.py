"""scripts/gpu_suite.py without a GPU: its plan, its steps on the block emulation, its page."""

from __future__ import annotations

import ctypes
import json

import pytest

from scripts import gpu_suite
from scripts.gpu import report, steps, timings
from scripts.gpu.emulated_device import TimedEmulation
from scripts.gpu.kernel_library import KernelLibrary
from tests.support import kernel_build

needs_compiler = pytest.mark.skipif(
    kernel_build.compiler() is None, reason=kernel_build.NO_COMPILER
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return kernel_build.emulated_library(kernel_build.shared_folder(tmp_path_factory))


def test_a_dry_run_names_every_step_and_workload(capsys):
    assert gpu_suite.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    for name in (
        *steps.STEPS,
        "Llama-2-7B B=64",
        "Llama-3-8B B=1",
        "prefill Llama-3-8B chunk 1024",
    ):
        assert name in said


def test_without_a_gpu_the_suite_says_so_and_exits_with_2(capsys, monkeypatch):
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


@needs_compiler
@pytest.mark.slow
def test_the_suite_runs_on_the_emulation_and_writes_json_and_page(library, tmp_path):
    chosen = [name for name in steps.STEPS if name != "build"]
    status = gpu_suite.main(
        ["--emulate", "--quick", "--library", str(library), "--results", str(tmp_path),
         "--build", str(tmp_path / "build"), "--only", *chosen]
    )  # fmt: skip
    assert status == 0
    (written,) = tmp_path.glob("gpu-*.json")
    done = json.loads(written.read_text())["steps"]
    statuses = {name: step["status"] for name, step in done.items()}
    skipped = dict.fromkeys(("graph_capture", "sanitizer", "harness", "tensorrt_rtx"), "not run")
    ran = dict.fromkeys(
        ("correctness", "int8_rings", "repeatability", "onnxruntime", "timing"), "ok"
    )
    assert statuses == {**ran, **skipped}
    assert all(done[name]["reason"] for name in skipped)
    assert done["correctness"]["largest_error_in_units_of_torchs"] <= steps.LARGEST_RATIO
    (small,) = done["timing"]["workloads"]
    assert set(small["times_faster_than"]) == {
        *("torch SDPA, same keys", "torch SDPA, full context", timings.UNSPLIT, timings.INT8)
    }
    assert small["failed"] == {}
    page = (tmp_path / "gpu.md").read_text()
    assert "| correctness | ok |" in page
    assert "| small |" in page


@needs_compiler
def test_wrong_kernels_fail_the_suite(library, monkeypatch):
    suite = steps.Suite(TimedEmulation(), library.parent, KernelLibrary(library), True, True)
    monkeypatch.setattr(steps, "LARGEST_RATIO", 1e-3)
    monkeypatch.setattr(
        steps, "all_streams", lambda quick: list(steps.streams.lap_streams(steps.torch.float16))
    )
    found = steps.perform("correctness", suite)
    assert found["status"] == "failed"
    assert found["failures"][0]["stream"] == "laps-float16"


@needs_compiler
def test_an_output_that_changes_between_launches_fails_the_suite(library):
    class Unsteady(KernelLibrary):
        launches = 0

        def launch(self, params, workspace, stream=0):
            super().launch(params, workspace, stream)
            self.launches += 1
            ctypes.memset(params.output, self.launches, 1)

    suite = steps.Suite(TimedEmulation(), library.parent, Unsteady(library), True, True)
    found = steps.perform("repeatability", suite)
    assert (found["status"], found["changed"]) == ("failed", ["small"])


def test_a_step_that_cannot_run_says_what_is_missing(tmp_path):
    suite = steps.Suite(TimedEmulation(), tmp_path)
    assert steps.perform("correctness", suite) == {
        "status": "not run", "reason": "the kernels were not built",
    }  # fmt: skip


def test_a_decode_step_reads_what_its_window_and_sinks_hold():
    workload = timings.Workload("w", batch=8, heads=32, kv_heads=8)
    assert workload.key_bytes == 8 * 8 * (4096 + 16) * 128 * 2 * 2


def test_the_page_says_not_yet_measured_until_a_gpu_has_written_it(tmp_path):
    assert report.results_in(tmp_path) == []
    assert "not yet measured" in report.empty_page()
