"""Builds the kernels for this CPU on the block emulation, once per test run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import made_once

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
KERNELS = PLUGINS / "lambda_attention"
HOST_SOURCES = ("rules.cpp", "validate.cpp", "plan.cpp", "c_api.cpp")
KERNEL_SOURCES = (
    *("launch.cu", "rows.cu", "decode_float16.cu", "decode_bfloat16.cu"),
    *("tiles_float16.cu", "tiles_bfloat16.cu"),
    *("decode_float16_int8.cu", "decode_bfloat16_int8.cu"),
    *("tiles_float16_int8.cu", "tiles_bfloat16_int8.cu"),
    *("tiles_hopper_float16.cu", "tiles_hopper_bfloat16.cu"),
    *("tiles_tall_float16.cu", "tiles_tall_bfloat16.cu"),
)
EMULATION_SOURCES = ("emulation.cpp", "hopper.cpp", "cuda_runtime.cpp")
NO_COMPILER = "no C++ compiler (g++): the kernels are not built for the block emulation"
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-DLMINF_EMULATE", "-DLMINF_HOPPER"),
)


def compiler() -> str | None:
    """The C++ compiler of this machine, if there is one."""
    return shutil.which("g++")


def cmake(build: Path, *options: str) -> list[str]:
    """The command that configures plugins/; with Ninja where there is no make."""
    ninja = shutil.which("make") is None and "CMAKE_GENERATOR" not in os.environ
    return ["cmake", *["-GNinja"] * ninja, "-S", str(PLUGINS), "-B", str(build), *options]


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of kernels that all of xdist's workers share."""
    return made_once.shared_folder(tmp_path_factory, "emulated_kernels")


def emulated_library(folder: Path) -> Path:
    """Build liblminf_kernels.so in a folder that test workers share; only the first one builds."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "liblminf_kernels.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(folder, library)
    return library


def compile_object(plugins: Path, source: str, target: Path) -> None:
    """Compile one file of plugins/lambda_attention, plugins/emulation or plugins/operator."""
    folders = {**dict.fromkeys(EMULATION_SOURCES, "emulation"), "rules.cpp": "operator"}
    folder = folders.get(source, "lambda_attention")
    includes = ["-I", str(plugins / "emulation"), "-I", str(plugins / "lambda_attention")]
    path = str(plugins / folder / source)
    _run([str(compiler()), *FLAGS, *includes, "-x", "c++", "-c", path, "-o", str(target)])


def link(objects: list[Path], library: Path) -> Path:
    """Link objects to a shared library, which appears when it is whole."""
    unfinished = library.with_suffix(".part")
    _run([str(compiler()), "-shared", *map(str, objects), "-o", str(unfinished)])
    return unfinished.rename(library)


def broken_library(folder: Path, source: str, file: str, line: str, wrong: str, work: Path) -> Path:
    """Build the library again with one object of a wrong line; return its path.

    Args:
        folder: with the objects of the right library.
        source: the translation unit of the object.
        file: source in which the line is replaced.
        line: what stands there.
        wrong: what takes its place.
        work: an empty folder.
    """
    sources = work / "plugins"
    shutil.copytree(PLUGINS, sources)
    broken = sources / "lambda_attention" / file
    assert line in broken.read_text()
    broken.write_text(broken.read_text().replace(line, wrong))
    target = work / Path(source).with_suffix(".o")
    compile_object(sources, source, target)
    others = [path for path in folder.glob("*.o") if path.name != target.name]
    # The linker keeps the first of what several objects have.
    return link([target, *others], work / "broken.so")


def _build(folder: Path, library: Path) -> None:
    sources = [*HOST_SOURCES, *KERNEL_SOURCES, *EMULATION_SOURCES]
    objects = [folder / Path(source).with_suffix(".o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda pair: compile_object(PLUGINS, *pair), zip(sources, objects, strict=True)
            )
        )
    link(objects, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
