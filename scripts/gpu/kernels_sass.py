"""Instructions of the compiled kernels, counted in their machine code.

python -m scripts.gpu.kernels_sass --out benchmarks/results/kernels-sass.json

Needs nvcc and cuobjdump (of the CUDA toolkit, or of Triton's wheel), no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.gpu.kernels_ptxas import KERNELS, kernel_name

SOURCES = (
    ("decode_float16.cu", ("90",)),
    ("tiles_float16.cu", ("80", "90")),
    ("tiles_tall_float16.cu", ("80", "90")),
    ("tiles_hopper_float16.cu", ("90a",)),
)
_FUNCTION = re.compile(r"Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
Code = list[tuple[int, str]]  # address, text


def parse(listing: str) -> dict[str, Code]:
    """Read what `cuobjdump -sass` prints: the instructions of each function."""
    found: dict[str, Code] = {}
    for line in listing.splitlines():
        if named := _FUNCTION.search(line):
            code = found.setdefault(named[1], [])
        elif read := _INSTRUCTION.match(line):
            code.append((int(read[1], 16), read[2]))
    return found


def count(code: Code, word: str) -> int:
    """Return how many instructions have a word."""
    return sum(word in text for _, text in code)


def shortest_loop(code: Code, word: str, least: int = 1) -> Code:
    """Return the shortest loop that has a word at least so many times; empty if none has."""
    loops = []
    for address, text in code:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            loops.append([x for x in code if int(branch[1], 16) <= x[0] <= address])
    return min((x for x in loops if count(x, word) >= least), key=len, default=[])


def describe(mangled: str, code: Code) -> dict[str, Any]:
    """Return what documents say of one kernel."""
    name, _, _, numbers = kernel_name(mangled)
    found: dict[str, Any] = {"kernel": name, "template": numbers, "instructions": len(code)}
    if name == "decodeKernel":
        ahead = next(n for n, (_, text) in enumerate(code) if "LDG.E.NA" in text)
        return {
            **found, "ahead_of_first_key": ahead, "tile": len(shortest_loop(code, "HMMA")),
        }  # fmt: skip
    if name == "tilesHopperKernel":  # the loop of a tile has the copies of keys and of values
        copies = 2 * numbers[0] // 8
        return {**found, "copying_a_tile": len(shortest_loop(code, "LDGSTS", copies))}
    loop = shortest_loop(code, "HMMA")
    return {**found, "tile": {word: count(loop, word) for word in ("LDSM", "HMMA")}}


def main(argv: list[str] | None = None) -> int:
    """Compile, count, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cuobjdump", default="cuobjdump")
    options = parser.parse_args(argv)
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        for source, architectures in SOURCES:
            for architecture in architectures:
                command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin"]
                subprocess.run([*command, "-o", cubin, str(KERNELS / source)], check=True)
                listed = [options.cuobjdump, "-sass", cubin]
                listing = subprocess.run(listed, check=True, capture_output=True, text=True)
                kernels += [
                    {"architecture": architecture, **describe(name, code)}
                    for name, code in parse(listing.stdout).items()
                ]
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    result = {"nvcc": said.stdout.strip().splitlines()[-1], "kernels": kernels}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
