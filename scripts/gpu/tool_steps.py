"""Steps that build, and that ask others: the sanitizer, the harness, onnxruntime, TensorRT."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lminf_export.runtime.environment import environment
from scripts.gpu.counters import by_kernel, read_details
from scripts.gpu.kernel_library import KernelLibrary
from scripts.gpu.suite import KERNELS, SkipStep, Suite

ROOT = Path(__file__).resolve().parent.parent.parent
# The installed commands, run by this interpreter.
MAINS = {
    "lminf-export": "from lminf_export.cli.export import main; main()",
    "lminf": "from lminf_export.cli.main import main; main()",
}
PROFILED = ("decode Llama-3-8B B=1", "decode Llama-3-8B B=8", "prefill Llama-3-8B chunk 1024")
SECTIONS = ["SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "Occupancy", "LaunchStats"]
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def machine(suite: Suite) -> dict[str, Any]:
    """The header of every result: the GPU and the versions of what runs on it."""
    found = environment()
    if suite.emulate:
        return {"status": "ok", "environment": {**found, "gpu": "none (block emulation)"}}
    major, minor = torch.cuda.get_device_capability()
    gpu = {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
    }
    return {"status": "ok", "environment": {**found, **gpu}}


def build(suite: Suite) -> dict[str, Any]:
    """Build kernels, plugin and harness for this GPU, whatever can be built here."""
    cmake = _tool("cmake")
    options = ["-DLMINF_EMULATE=ON"]
    if not suite.emulate:
        _tool("nvcc")
        major, minor = torch.cuda.get_device_capability()
        options = [f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"]
        if headers := os.environ.get("TENSORRT_INCLUDE_DIR"):
            first = headers.partition(os.pathsep)[0]  # one build has the headers of one release
            options.append(f"-DTENSORRT_INCLUDE_DIR={first}")
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]  # some machines have no make
    configured = run([cmake, "-S", str(ROOT / "plugins"), "-B", str(suite.build), *options])
    run([cmake, "--build", str(suite.build), "--parallel", str(os.cpu_count() or 1)])
    KernelLibrary(suite.build / KERNELS)  # its structures are those of this checkout
    left_out = re.findall(r"-- (.*left out.*)", configured)
    return {"status": "ok", "options": options, "left_out": left_out}


def sanitizer(suite: Suite) -> dict[str, Any]:
    """A few streams by every kernel of this device under compute-sanitizer's tools."""
    if suite.emulate:
        raise SkipStep("compute-sanitizer looks at GPUs only")
    tool = _tool("compute-sanitizer")
    results: dict[str, str] = {}
    first = "hopper_kernel" if suite.runs_hopper() else "correctness"
    for name, step in itertools.product(SANITIZER_TOOLS, (first, "tall_kernel", "last_block")):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "step.json"
            done = subprocess.run(
                [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m",
                 "scripts.gpu.one_step", step, "--quick", "--out", str(out),
                 "--build", str(suite.build), "--library", str(suite.kernels().path)],
                capture_output=True, text=True, check=False, cwd=ROOT,
            )  # fmt: skip
            found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        right = done.returncode == 0 and found.get("status") == "ok"
        results[f"{name} {step}"] = "ok" if right else (done.stdout + done.stderr)[-2000:]
        suite.keep({"tools": results})
    bad = [name for name, result in results.items() if result != "ok"]
    return {"status": "failed" if bad else "ok", "tools": results}


def counters(suite: Suite) -> dict[str, Any]:
    """Hardware counters of single kernels, by Nsight Compute."""
    if suite.emulate:
        raise SkipStep("the emulation has no hardware counters")
    tool = _tool("ncu")
    found: dict[str, Any] = {}
    for workload in PROFILED:
        said = run(
            [tool, "--clock-control", "none", *(f"--section={name}" for name in SECTIONS),
             "--kernel-name", "regex:Kernel", "--launch-skip", "6", "--launch-count", "9",
             sys.executable, "-m", "scripts.gpu.profiled", workload,
             "--library", str(suite.kernels().path)]
        )  # fmt: skip
        found[workload] = by_kernel(read_details(said))
        suite.keep({"workloads": found})
    empty = [workload for workload, kernels in found.items() if not kernels]
    return {"status": "failed" if empty else "ok", "workloads": found, "without_kernels": empty}


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


def run(command: list[str]) -> str:
    """Run a command and return what it printed.

    Raises:
        RuntimeError: with the end of its messages.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SkipStep(f"no {name} on the path")
    return found
