"""Hold the C++ sources to .clang-format and .clang-tidy.

python -m scripts.checks.cpp_lint
python -m scripts.checks.cpp_lint --fix    format instead of comparing, then lint

Both tools come from PyPI. clang-tidy reads what compiles without CUDA: the operator's rules, the
launcher's decisions, onnxruntime's operator and the CPU kernels with portable vectors; with
TENSORRT_INCLUDE_DIR set to a folder with NvInferRuntime.h (or to several, of which the first
counts) the TensorRT plugin and its harness too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS, EXAMPLES = ROOT / "plugins", ROOT / "examples"
ENDS = {".h", ".cc", ".cpp", ".cu", ".cuh", ".inl"}
# Compiled for an instruction set of one processor, or against headers that are not here.
SKIPPED = ("_avx2.cc", "_avx512.cc", "_avx512vnni.cc", "cuda_kernel.cc", "ort_abi_check.cc")
FOLDERS = ("operator", "lambda_attention", "onnxruntime")
TENSORRT_FOLDERS = ("tensorrt", "tests/harness")
HEADERS = os.environ.get("TENSORRT_INCLUDE_DIR", "").split(os.pathsep)[0]
EMULATED = ("-DLMINF_EMULATE", "-I", str(PLUGINS / "emulation"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fix", action="store_true", help="format the sources in place")
    results = [_format(fix=parser.parse_args().fix)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results += pool.map(_tidy, _units())
    sys.exit(int(any(results)))


def _format(*, fix: bool) -> int:
    found = (p for folder in (PLUGINS, EXAMPLES) for p in folder.rglob("*") if p.suffix in ENDS)
    sources = sorted(map(str, found))
    mode = ["-i"] if fix else ["--dry-run", "--Werror"]
    return subprocess.run([_tool("clang-format"), *mode, *sources], check=False).returncode


def _units() -> list[Path]:
    """Return the files clang-tidy can compile here."""
    folders = [*FOLDERS, *(TENSORRT_FOLDERS if HEADERS else ())]
    found = [p for folder in folders for p in sorted((PLUGINS / folder).rglob("*.c*"))]
    return [p for p in found if p.suffix in {".cc", ".cpp"} and not p.name.endswith(SKIPPED)]


def _tidy(source: Path) -> int:
    includes = [
        "-I",
        str(PLUGINS / "lambda_attention"),
        *(("-isystem", HEADERS) if HEADERS else ()),
    ]
    command = [_tool("clang-tidy"), "--quiet", str(source), "--", "-std=c++17"]
    done = subprocess.run(
        [*command, *EMULATED, *includes], capture_output=True, text=True, check=False
    )
    if done.returncode:
        # Standard error only counts the warnings that system headers hide.
        print(done.stdout or done.stderr, end="")
    return done.returncode


def _tool(name: str) -> str:
    """Return the tool beside this Python, or the one on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else name


if __name__ == "__main__":
    main()
