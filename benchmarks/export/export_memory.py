"""How much memory an export takes: a 1.1-billion-parameter Llama at every element type.

Writes a checkpoint of random weights shard by shard, exports it in a child process and samples
that process's anonymous memory (RssAnon). What counts is the peak over the interpreter with
its imports. One JSON, with versions; needs about 12 GB of disk.

    python -m benchmarks.export.export_memory --out benchmarks/results/export_memory.json
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.support.checkpoints import SHAPES, write_checkpoint
from benchmarks.support.memory import IMPORTS, anonymous_bytes
from benchmarks.support.result import write_result
from lminf_export.runtime.environment import environment


def peak_of(code: str) -> tuple[int, float]:
    """Run Python code in a child; return its peak anonymous memory and its seconds."""
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, "-c", code])
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.005)
    if child.returncode:
        raise SystemExit(f"child failed with {child.returncode}: {code}")
    return peak, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder on a disk with 12 GB free")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="lminf-", dir=arguments.work))
    try:
        result = measure(work)
    finally:
        shutil.rmtree(work)
    write_result(arguments.out, result)


def measure(work: Path) -> dict[str, object]:
    checkpoint = work / "model"
    parameters = write_checkpoint(checkpoint, SHAPES["1b"], torch.bfloat16, 2048)
    # The interpreter with its imports holds still for a moment, so that it is sampled.
    imports, _ = peak_of(f"{IMPORTS}; import time; time.sleep(0.3)")
    rows = []
    for dtype in ("float32", "float16", "bfloat16"):
        out = work / dtype
        code = (
            f"{IMPORTS}; import lminf_export; "
            f"lminf_export.export({str(checkpoint)!r}, {str(out)!r}, dtype={dtype!r})"
        )
        peak, seconds = peak_of(code)
        size = sum(p.stat().st_size for p in out.iterdir())
        shutil.rmtree(out)
        rows.append(
            {
                "dtype": dtype,
                "peak_anonymous_over_imports_bytes": peak - imports,
                "seconds": round(seconds, 1),
                "bundle_bytes": size,
            }
        )
        print(rows[-1], file=sys.stderr)
    return {
        "benchmark": "export_memory",
        "parameters": parameters,
        "source_dtype": "bfloat16",
        "imports_anonymous_bytes": imports,
        "exports": rows,
        **environment(),
    }


if __name__ == "__main__":
    main()
