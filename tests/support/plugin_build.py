"""Builds the TensorRT plugin on the emulated kernels, and the harness, once per test run.

TENSORRT_INCLUDE_DIR names the folders of TensorRT's headers, separated as in PATH: one release, or
several, of which the first is the one that most tests take.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.kernel_build import KERNELS, NO_COMPILER, PLUGINS, compiler, emulated_library

HEADERS = [Path(p) for p in os.environ.get("TENSORRT_INCLUDE_DIR", "").split(os.pathsep) if p]
PLUGIN_SOURCES = (
    *("attributes.cpp", "cache_use.cpp", "logger.cpp", "tensors.cpp"),
    *("cuda_version.cpp", "plugin.cpp", "library.cpp"),
)
HARNESS_SOURCES = ("build.cpp", "case.cpp", "main.cpp", "memory.cpp", "run.cpp")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")

NO_HEADERS = (
    "TensorRT's headers: TENSORRT_INCLUDE_DIR is not set to folders with NvInferRuntime.h, one for "
    "each release"
)
_HAVE_HEADERS = bool(HEADERS) and all((path / "NvInferRuntime.h").is_file() for path in HEADERS)
needs_headers = pytest.mark.skipif(not _HAVE_HEADERS, reason=NO_HEADERS)


def _release(headers: Path) -> str:
    """Return a name for a folder of headers, such as "11.1"."""
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8")
    numbers = r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR)(?:_ENTERPRISE)? (\d+)"
    found = dict(re.findall(numbers, text))
    return f"{found['MAJOR']}.{found['MINOR']}"


RELEASES = {_release(headers): headers for headers in HEADERS} if _HAVE_HEADERS else {}


def every_release(name: str) -> pytest.MarkDecorator:
    """Run a test with each release whose headers are here; the argument gets its name."""
    skipped = [pytest.param(None, marks=pytest.mark.skip(reason=NO_HEADERS))]
    return pytest.mark.parametrize(name, list(RELEASES) or skipped)


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


def recording_library(folder: Path) -> Path:
    """Build what the plugin takes note of caches with, and one more function.

    `pretendStep(inputs, outputs, numOutputs, numSinkTokens)` is what an enqueue does there. No
    header of TensorRT's is needed.
    """
    library = folder / "recording.so"
    source = folder / "pretend.cpp"
    source.write_text(_PRETEND, encoding="utf-8")
    includes = ("-I", str(PLUGINS / "emulation"), "-I", str(PLUGINS / "tensorrt"))
    sources = (str(source), str(PLUGINS / "tensorrt" / "cache_use.cpp"))
    _run([str(compiler()), *FLAGS, *includes, "-shared", *sources, "-o", str(library)])
    return library


def built_mark(folder: Path, version: str | None) -> Path:
    """Build a library of the one file that says the CUDA runtime; None for the emulation's."""
    library = folder / "mark.so"
    source = str(PLUGINS / "tensorrt" / "cuda_version.cpp")
    defined = () if version is None else (f"-DCUDART_VERSION={version}",)
    includes = ("-I", str(PLUGINS / "emulation"))
    _run([str(compiler()), *FLAGS, *defined, *includes, "-shared", source, "-o", str(library)])
    return library


_PRETEND = """
#include "cache_use.h"
extern "C" __attribute__((visibility("default"))) void pretendStep(
    const void* const* inputs, void* const* outputs, std::int32_t numOutputs, std::int64_t sinks) {
  lminf::tensorrt::noteCaches(inputs, outputs, numOutputs, sinks);
}
"""


def emulated_plugin(folder: Path, release: str | None = None) -> Built:
    """Build in a folder that test workers share; only the first one builds.

    Args:
        folder: of all builds.
        release: of TensorRT's headers; by default the first that is here.
    """
    kernels = emulated_library(folder)
    release = release or next(iter(RELEASES))
    place = folder / f"tensorrt-{release}"
    place.mkdir(exist_ok=True)
    built = Built(place / "liblminf_tensorrt.so", place / "plugin_harness")
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.harness.exists():
            _build(place, built, kernels, RELEASES[release])
    return built


def _build(folder: Path, built: Built, kernels: Path, headers: Path) -> None:
    plugin = [PLUGINS / "tensorrt" / name for name in PLUGIN_SOURCES]
    harness = [PLUGINS / "tests" / "harness" / name for name in HARNESS_SOURCES]
    objects = {source: folder / f"{source.parent.name}_{source.stem}.o" for source in plugin}
    objects |= {source: folder / f"harness_{source.stem}.o" for source in harness}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(functools.partial(_compile, headers), objects, objects.values()))
    exports = PLUGINS / "tensorrt" / "exports.map"
    # The kernels' objects lie where their library was made; c_api.o is not of the plugin.
    parts = [o for o in kernels.parent.glob("*.o") if o.stem != "c_api"]
    _link(
        built.plugin,
        "-shared",
        *(str(o) for o in (*(objects[s] for s in plugin), *parts)),
        "-Wl,--no-undefined",
        f"-Wl,--version-script={exports}",
    )
    _link(built.harness, "-rdynamic", *(str(objects[source]) for source in harness))


def _compile(headers: Path, source: Path, target: Path) -> None:
    includes = ("-isystem", str(headers), "-I", str(PLUGINS / "emulation"), "-I", str(KERNELS))
    _run([str(compiler()), *FLAGS, *includes, "-c", str(source), "-o", str(target)])


def _link(target: Path, *words: str) -> None:
    unfinished = target.with_name(f"{target.name}.part")
    _run([str(compiler()), *words, "-ldl", "-o", str(unfinished)])
    unfinished.rename(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
