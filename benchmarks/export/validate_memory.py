"""How much memory and time `lminf validate` takes: a real vocabulary, and a model of 7 billion.

Exports each model, validates it by the command, and samples the memory of that process: anonymous
(its own) and resident (with pages of mapped files, which the system can take back). Random models
are Llama shapes in float16, whose weights the bundle links. One JSON, with versions.

    python -m benchmarks.export.validate_memory --model DIR --shape llama-2-7b --work DISK \\
        --out benchmarks/results/validate_memory.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.support.checkpoints import SHAPES, write_checkpoint
from benchmarks.support.memory import anonymous_bytes
from benchmarks.support.result import write_result
from lminf_export import Bundle, export
from lminf_export.runtime.environment import environment

_PROGRAM = "from lminf_export.cli.main import main; main()"
_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", default=[], help="a model's folder")
    parser.add_argument("--shape", action="append", default=[], choices=SHAPES)
    parser.add_argument("--window-size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, help="of the stream; by default the command's")
    parser.add_argument("--work", type=Path, help="folder on a disk with room for the models")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="keep the other models of --out")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.add:
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["models"]
    for model in (*arguments.model, *arguments.shape):
        work = Path(tempfile.mkdtemp(prefix="lminf-", dir=arguments.work))
        try:
            row = measure(work, model, arguments.window_size, arguments.tokens)
            rows = [*(other for other in rows if other["model"] != row["model"]), row]
        finally:
            shutil.rmtree(work)
        print(rows[-1], file=sys.stderr)
    write_result(arguments.out, {"benchmark": "validate_memory", "models": rows, **environment()})


def measure(work: Path, model: Path | str, window_size: int, tokens: int | None) -> dict[str, Any]:
    """Export a model, or a random one of a shape, and validate it."""
    options: dict[str, Any] = {"window_size": window_size}
    source = model
    if not isinstance(model, Path):
        source = work / model
        write_checkpoint(source, SHAPES[model], torch.float16, 4096)
        options |= {"dtype": "float16", "weights": "link"}
    start = time.perf_counter()
    bundle = export(source, work / "bundle", **options)
    seconds = time.perf_counter() - start
    report, peaks = validated(bundle, [] if tokens is None else ["--tokens", str(tokens)])
    manifest = bundle.manifest
    return {
        "model": source.name,
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "weights_bytes": sum(manifest.files[name].bytes for name in manifest.files_of("weights")),
        "window_size": window_size,
        "tested_window": report["tested_window"],
        "tokens": report["comparisons"][0]["tokens"],
        "passed": report["passed"],
        "largest_error": max(row["max_error"] for row in report["comparisons"]),
        "export_seconds": round(seconds, 1),
        **peaks,
    }


def validated(bundle: Bundle, options: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Validate a bundle in a process of its own; return its report, and its peaks and seconds."""
    command = [sys.executable, "-c", _PROGRAM, "validate", str(bundle.path), "--json", *options]
    start, anonymous, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(child.pid))
            with contextlib.suppress(psutil.NoSuchProcess):
                resident = max(resident, process.memory_info().rss)
            time.sleep(_SECONDS)
        output.seek(0)
        text = output.read()
    if child.returncode not in (0, 1):
        raise SystemExit(f"validation failed with {child.returncode}")
    peaks = {
        "seconds": round(time.perf_counter() - start, 1),
        "load_average": round(psutil.getloadavg()[0], 1),
        "peak_anonymous_bytes": anonymous,
        "peak_resident_bytes": resident,
    }
    return json.loads(text), peaks


if __name__ == "__main__":
    main()
