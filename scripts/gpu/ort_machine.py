"""The first stages of onnxruntime_gpu: what the machine has, and the operator's library for it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from scripts.gpu.onnxruntime_gpu import ROOT, Run, SkipStage

_COPY_BYTES = 4 * 2**30
_ROUNDS = 20


def environment(run: Run) -> list[str]:
    """Versions, providers, the GPU, and what it copies in a second."""
    import numpy
    import onnxruntime as ort
    import torch
    import transformers

    run.note(
        python=platform.python_version(),
        machine=platform.platform(),
        cores=os.cpu_count(),
        onnxruntime=ort.__version__,
        onnxruntime_build=ort.get_build_info(),
        providers=ort.get_available_providers(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=numpy.__version__,
    )
    if not run.on_gpu:
        return []
    run.note(**describe_gpu(), copy_bytes_per_second=copy_bandwidth())
    problems = []
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        problems.append("this onnxruntime has no CUDAExecutionProvider")
    return problems


def describe_gpu() -> dict[str, Any]:
    """Return the GPU's name, its driver, and CUDA's version."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    said = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    name, driver, memory = (part.strip() for part in said.splitlines()[0].split(","))
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "gpu": name,
        "driver": driver,
        "memory": memory,
        "compute_capability": capability,
        "cuda": torch.version.cuda,
    }


def copy_bandwidth() -> float:
    """Return the bytes a second that a copy within the GPU's memory reads and writes together."""
    import torch

    source = torch.ones(_COPY_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    del source, target
    torch.cuda.empty_cache()
    return 2 * _COPY_BYTES / best


def build(run: Run) -> list[str]:
    """Build the operator's library, with CUDA kernels for this GPU, into the package.

    Where LMINF_ORT_LIBRARY names a library that was built elsewhere, that is taken.
    """
    if given := os.environ.get("LMINF_ORT_LIBRARY"):
        return _install(run, Path(given), [f"built elsewhere: {Path(given).name}"])
    for tool in ("cmake", "ninja", *(["nvcc"] if run.on_gpu else [])):
        if _tool(tool) is None:
            raise SkipStage(f"there is no {tool} here")
    source = "plugins" if run.on_gpu else "plugins/onnxruntime"
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    if run.on_gpu:
        import torch

        major, minor = torch.cuda.get_device_capability()
        options.append(f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real")
        options.append(f"-DCMAKE_CUDA_COMPILER={_tool('nvcc')}")
    folder = run.build if run.on_gpu else run.build.with_name(run.build.name + "-cpu")
    _call([str(_tool("cmake")), "-S", source, "-B", str(folder), *options])
    _call([str(_tool("cmake")), "--build", str(folder), "--parallel", "--target", "lminf_ort"])
    (made,) = folder.glob("**/liblminf_ort.so")
    return _install(run, made, options)


def _install(run: Run, made: Path, options: list[str]) -> list[str]:
    target = ROOT / "lminf_export" / "lib" / made.name
    target.parent.mkdir(exist_ok=True)
    shutil.copy2(made, target)

    from lminf_export.runtime.kernels import open_library

    library = open_library(target)
    run.note(
        options=options,
        bytes=target.stat().st_size,
        library_providers=library.providers,
        cuda_head_dims=library.cuda_head_dims,
    )
    missing = run.provider not in library.providers
    return [f"the library has no kernels for {run.provider}"] if missing else []


def _tool(name: str) -> str | None:
    """Return a program's path: from the PATH, or nvcc from where CUDA is usually installed."""
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.is_file() else None)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-1500:]}")
