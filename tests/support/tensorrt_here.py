"""Which parts of TensorRT this machine has: lean runtimes and full bindings, as pip installs them.

Several releases share one module's name, so each lies in a folder of its own
(pip install --target DIR tensorrt-lean-cu13), and each is imported in a process of its own.
TENSORRT_LEAN_DIRS and TENSORRT_BINDINGS_DIRS name the folders, separated as in PATH.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAN = [Path(p) for p in os.environ.get("TENSORRT_LEAN_DIRS", "").split(os.pathsep) if p]
BINDINGS = [Path(p) for p in os.environ.get("TENSORRT_BINDINGS_DIRS", "").split(os.pathsep) if p]

NO_LEAN = "TensorRT's lean runtimes: TENSORRT_LEAN_DIRS names no folders with tensorrt-lean-cu13/12"
NO_BINDINGS = (
    "TensorRT's full bindings: TENSORRT_BINDINGS_DIRS names no folders with "
    "tensorrt-cu13-bindings or tensorrt-cu12-bindings (and TENSORRT_LEAN_DIRS the libraries)"
)
lean_folders = pytest.mark.parametrize(
    "lean", LEAN or [pytest.param(None, marks=pytest.mark.skip(reason=NO_LEAN))], ids=str
)
bindings_folders = pytest.mark.parametrize(
    "bindings",
    (BINDINGS if LEAN and shutil.which("gcc") else [])
    or [pytest.param(None, marks=pytest.mark.skip(reason=NO_BINDINGS))],
    ids=str,
)

# What the full bindings want of libraries nobody can install here; Builder() then fails, and
# everything that needs none is the real thing.
_STUB = """
void *createInferBuilder_INTERNAL(void *logger, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int v) { return 0; }
void *getBuilderPluginRegistry(int capability) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *logger, const char *name) { return 1; }
"""


def run_python(
    code: str, *folders: Path, library_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that finds packages in these folders first."""
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    if library_path is not None:
        environment["LD_LIBRARY_PATH"] = str(library_path)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )


@functools.cache
def stub_libraries(bindings: Path, folder: Path) -> Path:
    """Build the libraries the full bindings ask for; returns the folder for the library path."""
    major = bindings_major(bindings)
    lean = next(
        lib for d in LEAN for lib in d.glob(f"tensorrt_lean_libs/libnvinfer_lean.so.{major}")
    )
    target = folder / f"stubs-{major}"
    target.mkdir(exist_ok=True)
    source = target / "stub.c"
    source.write_text(_STUB, encoding="utf-8")
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = target / f"lib{name}.so.{major}"
        words = ["gcc", "-shared", "-fPIC", "-o", str(library), str(source)]
        words += ["-Wl,--no-as-needed", str(lean), f"-Wl,-rpath,{lean.parent}"]
        subprocess.run(words, check=True, capture_output=True)
    return target


def bindings_major(bindings: Path) -> str:
    """Return the major release of a folder's bindings, as its package says."""
    (info,) = bindings.glob("tensorrt_cu*_bindings-*.dist-info")
    return info.name.split("-")[1].split(".")[0]
