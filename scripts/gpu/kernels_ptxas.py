"""Resources of the compiled kernels: registers, spills and shared memory per architecture.

python -m scripts.gpu.kernels_ptxas --out benchmarks/results/kernels-ptxas.json

Needs nvcc, no GPU. `blocks_per_multiprocessor` is what registers allow (64 Ki of them), before
shared memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "plugins" / "lambda_attention"
ARCHITECTURES = ("80", "86", "89", "90", "90a", "100", "120")
DECODE_SOURCES = (
    *("decode_float16.cu", "decode_bfloat16.cu"),
    *("decode_float16_int8.cu", "decode_bfloat16_int8.cu"),
)
SOURCES = (
    *DECODE_SOURCES,
    *("tiles_float16.cu", "tiles_bfloat16.cu"),
    *("tiles_float16_int8.cu", "tiles_bfloat16_int8.cu"),
    *("tiles_tall_float16.cu", "tiles_tall_bfloat16.cu"),
    "rows.cu",
)
HOPPER_ARCHITECTURE = "90a"
HOPPER_SOURCES = ("tiles_hopper_float16.cu", "tiles_hopper_bfloat16.cu")
REGISTERS = 65536
_FUNCTION = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_NAME = re.compile(r"5lminf\d+(\w+?Kernel)I(.*?)EEv")
_TYPES = {"f": "float32", "NS_4HalfE": "float16", "NS_8Bfloat16E": "bfloat16"}
_INT8 = "NS_4Int8E"
_THREADS = {
    **dict.fromkeys(("decodeKernel", "appendKernel", "combineKernel", "simpleKernel"), 128),
    "tilesTallKernel": 128,
    "tilesHopperKernel": 384,
}


def kernel_name(mangled: str) -> tuple[str, str, bool, list[int]]:
    """Return function, element type, whether rings are int8, and integer template arguments."""
    found = _NAME.search(mangled)
    if found is None:
        raise ValueError(f"{mangled}: not a kernel of this project")
    function, arguments = found.groups()
    kind = next(name for code, name in _TYPES.items() if arguments.startswith(code))
    return (
        function,
        kind,
        _INT8 in arguments,
        [int(n) for n in re.findall(r"Li(\d+)", arguments + "E")],
    )


def parse(output: str) -> list[dict[str, Any]]:
    """Read what `ptxas -v` said: one entry for each kernel."""
    kernels: list[dict[str, Any]] = []
    for line in output.splitlines():
        if found := _FUNCTION.search(line):
            function, kind, int8, numbers = kernel_name(found[1])
            head_dim, *rest = numbers
            threads = rest[0] * 32 if function == "tilesKernel" else _THREADS[function]
            kernels.append(
                {"architecture": found[2], "kernel": function, "dtype": kind, "head_dim": head_dim}
            )
            if int8:
                kernels[-1]["rings"] = "int8"
            if function == "decodeKernel":
                kernels[-1]["query_rows"] = rest[0] * 8
            kernels[-1]["threads"] = threads
        elif found := _SPILLS.search(line):
            kernels[-1]["stack_bytes"] = int(found[1])
            kernels[-1]["spill_bytes"] = int(found[2]) + int(found[3])
        elif found := _REGISTERS.search(line):
            registers = int(found[1])
            warps = kernels[-1]["threads"] // 32
            per_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256 a warp
            kernels[-1]["registers"] = registers
            kernels[-1]["blocks_per_multiprocessor"] = REGISTERS // (per_warp * warps)
    return kernels


def compile_one(nvcc: str, source: str, architecture: str, folder: Path) -> list[dict[str, Any]]:
    """Compile one file for one architecture and return its kernels.

    Raises:
        RuntimeError: with the compiler's messages, warnings included.
    """
    target = folder / f"{source}.{architecture}.cubin"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-cubin",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-Xptxas",
        "-v",
    ]
    done = subprocess.run(
        [*command, str(KERNELS / source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    serialized = "wgmma.mma_async instructions are serialized" in done.stderr
    if done.returncode or "warning" in done.stderr or serialized:
        raise RuntimeError(f"{source} for sm_{architecture}:\n{done.stderr[-4000:]}")
    return parse(done.stderr)


def report(
    sources: tuple[str, ...] = SOURCES, architectures: tuple[str, ...] = ARCHITECTURES
) -> list[dict[str, Any]]:
    """Compile files for architectures, two at a time, and return every kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is not on the path")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_one, nvcc, source, architecture, Path(name))
            for architecture in architectures
            for source in (HOPPER_SOURCES if architecture == HOPPER_ARCHITECTURE else sources)
        ]
        return [kernel for job in jobs for kernel in job.result()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    arguments = parser.parse_args()
    start = time.monotonic()
    kernels = report(architectures=tuple(arguments.architectures))
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    result = {
        "benchmark": "kernels-ptxas",
        "nvcc": re.search(r"V([\d.]+)", version.stdout)[1],  # type: ignore[index]
        "kernels": kernels,
    }
    spilling = [k for k in kernels if k["spill_bytes"]]
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(kernels)} kernels in {time.monotonic() - start:.0f} s, {len(spilling)} spill")
    for kernel in spilling:
        print(kernel)
    return int(any(k["kernel"] == "decodeKernel" for k in spilling))


if __name__ == "__main__":
    sys.exit(main())
