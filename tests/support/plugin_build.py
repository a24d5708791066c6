"""Builds the TensorRT plugin on the emulated kernels, and the harness, once per test run."""

from __future__ import annotations

import fcntl
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.kernel_build import KERNELS, NO_COMPILER, PLUGINS, compiler, emulated_library

HEADERS = os.environ.get("TENSORRT_INCLUDE_DIR", "")
PLUGIN_SOURCES = ("attributes.cpp", "logger.cpp", "tensors.cpp", "plugin.cpp", "library.cpp")
HARNESS_SOURCES = ("build.cpp", "case.cpp", "main.cpp", "memory.cpp", "run.cpp")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")

needs_headers = pytest.mark.skipif(
    not (Path(HEADERS) / "NvInferRuntime.h").is_file() or not HEADERS,
    reason="TensorRT's headers: TENSORRT_INCLUDE_DIR is not set to a folder with NvInferRuntime.h",
)
needs_compiler = pytest.mark.skipif(compiler() is None, reason=NO_COMPILER)


@dataclass(frozen=True)
class Built:
    """What a build has made.

    Attributes:
        plugin: liblminf_tensorrt.so on the emulated kernels.
        harness: plugin_harness.
    """

    plugin: Path
    harness: Path


def emulated_plugin(folder: Path) -> Built:
    """Build in a folder that test workers share; only the first one builds."""
    kernels = emulated_library(folder)
    built = Built(folder / "liblminf_tensorrt.so", folder / "plugin_harness")
    with (folder / "plugin.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.harness.exists():
            _build(folder, built, kernels)
    return built


def _build(folder: Path, built: Built, kernels: Path) -> None:
    plugin = [PLUGINS / "tensorrt" / name for name in PLUGIN_SOURCES]
    harness = [PLUGINS / "tests" / "harness" / name for name in HARNESS_SOURCES]
    objects = {source: folder / f"{source.parent.name}_{source.stem}.o" for source in plugin}
    objects |= {source: folder / f"harness_{source.stem}.o" for source in harness}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, objects, objects.values()))
    exports = PLUGINS / "tensorrt" / "exports.map"
    # The kernels' objects lie where their library was made; c_api.o is not of the plugin.
    parts = [o for o in kernels.parent.glob("*.o") if o not in objects.values()]
    parts = [o for o in parts if o.stem != "c_api"]
    _link(
        built.plugin,
        "-shared",
        *(str(o) for o in (*(objects[s] for s in plugin), *parts)),
        "-Wl,--no-undefined",
        f"-Wl,--version-script={exports}",
    )
    _link(built.harness, "-rdynamic", *(str(objects[source]) for source in harness))


def _compile(source: Path, target: Path) -> None:
    includes = ("-isystem", HEADERS, "-I", str(PLUGINS / "emulation"), "-I", str(KERNELS))
    _run([str(compiler()), *FLAGS, *includes, "-c", str(source), "-o", str(target)])


def _link(target: Path, *words: str) -> None:
    unfinished = target.with_name(f"{target.name}.part")
    _run([str(compiler()), *words, "-ldl", "-o", str(unfinished)])
    unfinished.rename(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
