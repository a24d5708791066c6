"""The steps of scripts/gpu_suite.py: each returns what it found, or says why it did not run."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from scripts.gpu import streams, timings
from scripts.gpu.check import Stream, run_stream
from scripts.gpu.kernel_library import KernelLibrary

ROOT = Path(__file__).resolve().parent.parent.parent
# The installed commands, run by this interpreter.
MAINS = {
    "lminf-export": "from lminf_export.cli.export import main; main()",
    "lminf": "from lminf_export.cli.main import main; main()",
}
LARGEST_RATIO = 2.0  # error in units of torch's in the same precision
REPEATS = 20
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class SkipStep(Exception):
    """The machine lacks what a step needs; the message names it."""


@dataclass
class Suite:
    """Settings and state that the steps share.

    Attributes:
        device: where kernels run.
        build: folder of the CMake build.
        library: the kernels, once they are built.
        quick: fewer streams, one size of timing: for the sanitizer and for tests.
        emulate: the device is the block emulation.
    """

    device: Any
    build: Path
    library: KernelLibrary | None = None
    quick: bool = False
    emulate: bool = False

    def kernels(self) -> KernelLibrary:
        """Return the built library.

        Raises:
            SkipStep: it was not built.
        """
        if self.library is None:
            raise SkipStep("the kernels were not built")
        return self.library


def build(suite: Suite) -> dict[str, Any]:
    """Build kernels, plugin and harness for this GPU, whatever can be built here."""
    cmake = _tool("cmake")
    options = ["-DLMINF_EMULATE=ON"]
    if not suite.emulate:
        _tool("nvcc")
        major, minor = torch.cuda.get_device_capability()
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"]
        if headers := os.environ.get("TENSORRT_INCLUDE_DIR"):
            options.append(f"-DTENSORRT_INCLUDE_DIR={headers}")
    plugins = str(ROOT / "plugins")
    configured = run([cmake, "-S", plugins, "-B", str(suite.build), *options])
    run([cmake, "--build", str(suite.build), "--parallel", str(os.cpu_count() or 1)])
    suite.library = KernelLibrary(suite.build / "lambda_attention" / "liblminf_kernels.so")
    left_out = re.findall(r"-- (.*left out.*)", configured)
    return {"status": "ok", "options": options, "left_out": left_out}


def correctness(suite: Suite, enqueue: Callable[..., None] | None = None) -> dict[str, Any]:
    """Run every stream against float64 and report the worst ratio to torch's own error."""
    return _run_all(suite, list(all_streams(suite.quick)), enqueue)


def int8_rings(suite: Suite) -> dict[str, Any]:
    """The same streams over rings of int8, and on a GPU each launch captured in a CUDA graph."""
    chosen = [replace(stream, int8_rings=True) for stream in all_streams(suite.quick)]
    result = _run_all(suite, chosen, None)
    if not suite.emulate:
        from scripts.gpu.cuda_device import launch_in_graph

        captured = _run_all(suite, chosen, launch_in_graph)
        result["captured"] = captured
        if captured["status"] == "failed":
            result["status"] = "failed"
    return result


def hopper_kernel(suite: Suite) -> dict[str, Any]:
    """The kernel for compute capability 9.0 with any number of rows, and without it many."""
    library = suite.kernels()
    if not (suite.device.hopper and library.has_hopper):
        raise SkipStep("the device is not of compute capability 9.0, or nvcc is older than 12.0")
    result: dict[str, Any] = {}
    for preference in ("hopper", "portable"):
        chosen = list(all_streams(suite.quick))
        result[preference] = _run_all(suite, chosen, None, KernelLibrary(library.path, preference))
    failed = any(part["status"] == "failed" for part in result.values())
    return {"status": "failed" if failed else "ok", **result}


def _run_all(
    suite: Suite,
    chosen: list[Stream],
    enqueue: Callable[..., None] | None,
    library: KernelLibrary | None = None,
) -> dict[str, Any]:
    library = library or suite.kernels()
    worst, failures, kernels = 0.0, [], set()
    for stream in chosen:
        outcome = run_stream(library, suite.device, stream, enqueue)
        worst = max(worst, outcome.ratio)
        kernels |= outcome.kernels
        if outcome.problems or outcome.ratio > LARGEST_RATIO:
            failures.append(
                {"stream": stream.name, "ratio": outcome.ratio, "problems": outcome.problems}
            )
    return {
        "status": "failed" if failures else "ok",
        "streams": len(chosen),
        "kernels": sorted(kernels),
        "largest_error_in_units_of_torchs": worst,
        "failures": failures,
    }


def all_streams(quick: bool) -> Iterable[Stream]:
    """Every stream of every type, or a few of each."""
    for dtype in (torch.float32, *streams.HALF_TYPES):
        found = [
            *streams.feature_streams(dtype),
            *streams.shape_streams(dtype),
            *streams.lap_streams(dtype),
            *streams.long_streams(dtype),
            *streams.tile_streams(dtype),
        ]
        yield from found[::17] if quick else found


def repeatability(suite: Suite) -> dict[str, Any]:
    """Layers of full size many times over: no order of sums depends on time, so no bit may."""
    library, device = suite.kernels(), suite.device
    chosen = [timings.small_workload()] if suite.quick else _layers_to_repeat()
    changed = []
    for workload in chosen:
        params, _inputs, outputs = timings.call_of(workload, device.name)
        size = library.workspace_size(params) // 4
        workspace = torch.empty(size, dtype=torch.float32, device=device.name)
        first: list[torch.Tensor] = []
        for _ in range(REPEATS):
            for scratch in (outputs[0], workspace):
                scratch.fill_(float("nan"))
            library.launch(params, workspace, device.stream())
            device.synchronize()
            first = first or [x.clone() for x in outputs]
            if not all(map(torch.equal, first, outputs)):  # NaN differs from itself, too
                changed.append(workload.name)
                break
    status = "failed" if changed else "ok"
    return {"status": status, "layers": len(chosen), "repeats": REPEATS, "changed": changed}


def _layers_to_repeat() -> list[timings.Workload]:
    layers = [w for w in timings.workloads() if w.batch <= 8]
    return [
        replace(w, name=f"{w.name}, head_dim {head_dim}, {dtype}", head_dim=head_dim, dtype=dtype)
        for w in layers
        for head_dim in (80, 128, 256)
        for dtype in streams.HALF_TYPES
    ]


def graph_capture(suite: Suite) -> dict[str, Any]:
    """The same streams, every launch captured in a CUDA graph and replayed."""
    if suite.emulate:
        raise SkipStep("the emulation has no CUDA graphs")
    from scripts.gpu.cuda_device import launch_in_graph

    return correctness(suite, launch_in_graph)


def sanitizer(suite: Suite) -> dict[str, Any]:
    """A few streams under compute-sanitizer's tools."""
    if suite.emulate:
        raise SkipStep("compute-sanitizer looks at GPUs only")
    tool = _tool("compute-sanitizer")
    command = [sys.executable, str(ROOT / "scripts" / "gpu_suite.py"), "--only", "correctness"]
    results = {}
    for name in SANITIZER_TOOLS:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [tool, "--tool", name, "--error-exitcode", "9", *command, "--quick",
                 "--library", str(suite.kernels().path), "--results", folder],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        results[name] = "ok" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    bad = [name for name, result in results.items() if result != "ok"]
    return {"status": "failed" if bad else "ok", "tools": results}


def harness(suite: Suite) -> dict[str, Any]:
    """The TensorRT plugin's whole life, with real enqueue on this GPU."""
    try:
        module = importlib.import_module("scripts.gpu.plugin_harness")
    except ModuleNotFoundError as error:
        raise SkipStep("this checkout has no plugin harness") from error
    binary, plugin = suite.build / "plugin_harness", suite.build / "liblminf_tensorrt.so"
    if not (binary.exists() and plugin.exists()):
        raise SkipStep("the plugin was not built: set TENSORRT_INCLUDE_DIR")
    failures, count = [], 0
    for graph in (False, True):
        player = module.Harness(binary, plugin, device="cuda", graph=graph)
        for stream in module.streams():
            with tempfile.TemporaryDirectory() as folder:
                reply = player.run(stream, Path(folder))
            count += 1
            if reply.problems:
                failures.append({"stream": stream.name, "problems": reply.problems})
    return {"status": "failed" if failures else "ok", "streams": count, "failures": failures}


def onnxruntime(suite: Suite) -> dict[str, Any]:
    """The operator in onnxruntime-gpu: the function body, and the custom operator if built."""
    try:
        module = importlib.import_module("scripts.gpu.onnx_check")
        ort = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise SkipStep(f"no module {error.name}") from error
    provider = "CPUExecutionProvider" if suite.emulate else "CUDAExecutionProvider"
    if provider not in ort.get_available_providers():
        raise SkipStep(f"this onnxruntime has no {provider} (install onnxruntime-gpu)")
    custom = suite.build / "onnxruntime" / "liblminf_ort.so"
    result: dict[str, Any] = {"body": module.largest_error(provider, None)}
    if custom.exists() and not suite.emulate:
        result["custom_operator"] = module.largest_error(provider, custom)
    else:
        result["custom_operator"] = "not run: liblminf_ort.so was not built with CUDA kernels"
    bad = [e for e in result.values() if isinstance(e, float) and e > module.TOLERANCE]
    return {"status": "failed" if bad else "ok", "largest_error": result}


def timing(suite: Suite) -> dict[str, Any]:
    """Every workload of the targets, contestants interleaved."""
    if not hasattr(suite.device, "seconds"):
        raise SkipStep("this device has no clock worth reading")
    chosen = timings.workloads()
    if suite.quick:
        chosen = [timings.small_workload()]
    library, flex = suite.kernels(), not suite.emulate
    results = []
    for workload in chosen:
        results.append(timings.measure(library, suite.device, workload, flex=flex))
        if not suite.emulate:
            torch.cuda.empty_cache()
    return {"status": "ok", "workloads": results}


def tensorrt_rtx(suite: Suite) -> dict[str, Any]:
    """A TensorRT-RTX engine of the demo model: whatever happens is recorded."""
    if suite.emulate:
        raise SkipStep("an engine runs on GPUs only")
    try:
        importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError as error:
        raise SkipStep("no module tensorrt_rtx") from error
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "demo" / "engine.plan"
        model = str(ROOT / "examples" / "demo-llama")
        steps = (
            ["lminf-export", "--model", model, "--out", str(plan), "--builder", "tensorrt-rtx"],
            ["lminf", "generate", str(plan), "--prompt", "In the beginning",
             "--max-new-tokens", "8"],
        )  # fmt: skip
        for program, *arguments in steps:
            command = [sys.executable, "-c", MAINS[program], *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            if done.returncode:
                said = (done.stdout + done.stderr).strip()[-1000:]
                return {"status": "recorded", "command": program, "said": said}
    return {"status": "ok", "said": done.stdout[-500:]}


STEPS: dict[str, Callable[[Suite], dict[str, Any]]] = {
    "build": build,
    "graph_capture": graph_capture,  # first: no kernel has been loaded yet when one is captured
    "correctness": correctness,
    "hopper_kernel": hopper_kernel,
    "int8_rings": int8_rings,
    "repeatability": repeatability,
    "sanitizer": sanitizer,
    "harness": harness,
    "onnxruntime": onnxruntime,
    "timing": timing,
    "tensorrt_rtx": tensorrt_rtx,
}


def perform(name: str, suite: Suite) -> dict[str, Any]:
    """Run one step; what it cannot do becomes part of the result, not the end of the suite."""
    try:
        return STEPS[name](suite)
    except SkipStep as reason:
        return {"status": "not run", "reason": str(reason)}
    except (RuntimeError, OSError, AssertionError) as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}


def run(command: list[str]) -> str:
    """Run a command and return what it printed.

    Raises:
        RuntimeError: with the end of its messages.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SkipStep(f"no {name} on the path")
    return found
