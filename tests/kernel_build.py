"""Builds the kernels for this CPU on the block emulation, once per test run."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLUGINS = ROOT / "plugins"
KERNELS = PLUGINS / "lambda_attention"
HOST_SOURCES = ("params.cpp", "plan.cpp", "c_api.cpp")
KERNEL_SOURCES = (
    *("launch.cu", "rows.cu", "decode_float16.cu", "decode_bfloat16.cu"),
    *("tiles_float16.cu", "tiles_bfloat16.cu"),
)
NO_COMPILER = "no C++ compiler (g++): the kernels are not built for the block emulation"
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-DLMINF_EMULATE"),
    *("-I", str(PLUGINS / "emulation"), "-I", str(KERNELS)),
)


def compiler() -> str | None:
    """The C++ compiler of this machine, if there is one."""
    return shutil.which("g++")


def emulated_library(folder: Path) -> Path:
    """Build liblminf_kernels.so in a folder that test workers share; only the first one builds."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "liblminf_kernels.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(folder, library)
    return library


def _build(folder: Path, library: Path) -> None:
    sources = [KERNELS / name for name in (*HOST_SOURCES, *KERNEL_SOURCES)]
    sources.append(PLUGINS / "emulation" / "emulation.cpp")
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, sources, objects))
    unfinished = library.with_suffix(".part")
    _run([str(compiler()), "-shared", *map(str, objects), "-o", str(unfinished)])
    unfinished.rename(library)


def _compile(source: Path, target: Path) -> None:
    _run([str(compiler()), *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
