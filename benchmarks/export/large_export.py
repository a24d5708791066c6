"""Cost of exporting a large checkpoint: memory, disk traffic, time against copying its files.

Writes a checkpoint of random weights shard by shard, copies its files (cold, synced) for the
time that alone takes, exports it in a child process, and copies it once more; everything is
deleted as soon as it is measured. Sampled: anonymous memory of the child and its builder
(RssAnon), over the interpreter with its imports. At the end: /proc/self/io of the child. Rows of
other shapes and exports that `--out` holds already stay there.

    python -m benchmarks.export.large_export --shapes llama-2-7b llama-3-8b --engine 1b \\
        --out benchmarks/results/large_export.json

Needs twice the checkpoint's size on disk, 32 GB for llama-3-8b.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.support.checkpoints import SHAPES, write_checkpoint
from benchmarks.support.memory import IMPORTS, anonymous_bytes
from benchmarks.support.result import write_result
from lminf_export.runtime.environment import environment

SOURCE_TYPES = {"llama-3-8b": torch.bfloat16}  # the others are stored in float16
# What is exported; "unchecked" is without the run beside the stock model that ends an export.
EXPORTS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16"},
    "float16-unchecked": {"dtype": "float16", "check": False},
    "int4": {"dtype": "float16", "quantize": "int4"},
}
ENGINES: dict[str, dict[str, Any]] = {
    "float16": {},
    "int4": {"quantize": "int4"},
    "int8": {"quantize": "int8"},
    "fp8": {"quantize": "fp8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exports", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["llama-2-7b", "llama-3-8b"])
    parser.add_argument("--engine", nargs="*", choices=SHAPES, default=[], help="build engines too")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {"benchmark": "large_export", "models": [], "engines": [], **environment()}
    if arguments.out is not None and arguments.out.is_file():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        result |= {name: before[name] for name in ("models", "engines")}
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory(prefix="lminf-", dir=arguments.work) as work:
            add_model(result["models"], measure_exports(shape, Path(work), arguments.exports))
    for shape in arguments.engine:
        with tempfile.TemporaryDirectory(prefix="lminf-", dir=arguments.work) as work:
            others = [row for row in result["engines"] if row["shape"] != shape]
            result["engines"] = others + measure_engines(shape, Path(work))
    write_result(arguments.out, result)


def add_model(models: list[dict[str, Any]], fresh: dict[str, Any]) -> None:
    """Put a model's exports in the place of those of the same name, or beside others."""
    for model in models:
        if model["shape"] == fresh["shape"]:
            exports = {row["export"]: row for row in (*model["exports"], *fresh["exports"])}
            model.update(fresh, exports=list(exports.values()))
            return
    models.append(fresh)


def measure_exports(shape: str, work: Path, names: list[str]) -> dict[str, Any]:
    """Export one shape; a checkpoint WORK/SHAPE that is there already is used and kept."""
    dtype = SOURCE_TYPES.get(shape, torch.float16)
    source = work.parent / shape
    if not (source / "model.safetensors.index.json").is_file():  # written last
        source = work / shape
        write_checkpoint(source, SHAPES[shape], dtype, 4096)
    source_bytes = size_of(source)
    imports = run_sampled(f"{IMPORTS}; import time; time.sleep(0.5)")["peak_anonymous_bytes"]
    exports = []
    for name, settings in ((name, EXPORTS[name]) for name in names):
        before = copy_seconds(source, work / "copy")
        found = measure_export(source, work / "bundle", settings)
        after = copy_seconds(source, work / "copy")
        must_move = source_bytes + found["bundle_bytes"]
        moved = found["read_bytes"] + found["write_bytes"]
        exports.append(
            {
                "export": name,
                "peak_anonymous_over_imports_bytes": found["peak_anonymous_bytes"] - imports,
                "seconds": round(found["seconds"], 1),
                "cpu_seconds": found["cpu_seconds"],
                "copy_seconds": [round(before, 1), round(after, 1)],
                "seconds_over_copying": round(2 * found["seconds"] / (before + after), 3),
                "bundle_bytes": found["bundle_bytes"],
                "read_bytes": found["read_bytes"],
                "write_bytes": found["write_bytes"],
                "traffic_over_needed": round(moved / must_move, 4),
            }
        )
        print(shape, exports[-1], file=sys.stderr)
    return {
        "shape": shape,
        "parameters": (source_bytes - small_files(source)) // dtype.itemsize,
        "source_dtype": str(dtype).removeprefix("torch."),
        "source_bytes": source_bytes,
        "imports_anonymous_bytes": imports,
        "exports": exports,
    }


def measure_export(source: Path, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Export in a child, from a cold disk; the bundle is deleted afterwards."""
    forget(source)
    code = (
        f"{IMPORTS}; import lminf_export, json, os; "
        f"lminf_export.export({str(source)!r}, {str(out)!r}, window_size=4096, **{settings!r}); "
        "io = dict(line.split(': ') for line in open('/proc/self/io')); "
        "print(json.dumps({**io, 'cpu': sum(os.times()[:2])}))"
    )
    found = run_sampled(code)
    io = json.loads(found["output"].splitlines()[-1])
    result = {
        "peak_anonymous_bytes": found["peak_anonymous_bytes"],
        "seconds": found["seconds"],
        "bundle_bytes": size_of(out),
        "read_bytes": int(io["read_bytes"]),
        "write_bytes": int(io["write_bytes"]),
        "cpu_seconds": round(io["cpu"], 1),
    }
    shutil.rmtree(out)
    return result


def measure_engines(shape: str, work: Path) -> list[dict[str, Any]]:
    """Build engines with TensorRT for RTX; its builder is a child of the child."""
    source, out = work / shape, work / "bundle"
    parameters = write_checkpoint(source, SHAPES[shape], torch.float16, 2048)
    rows = []
    for name, settings in ENGINES.items():
        code = (
            f"{IMPORTS}; import lminf_export; lminf_export.export({str(source)!r}, "
            f"{str(out / 'engine.plan')!r}, builder='tensorrt-rtx', window_size=2048, "
            f"**{settings!r})"
        )
        found = run_sampled(code)
        rows.append(
            {
                "shape": shape,
                "parameters": parameters,
                "builder": "tensorrt-rtx",
                "engine": name,
                "weights_bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
                "plan_bytes": (out / "engine.plan").stat().st_size,
                "peak_anonymous_bytes": found["peak_anonymous_bytes"],
                "peak_resident_bytes": found["peak_resident_bytes"],
                "seconds": round(found["seconds"], 1),
            }
        )
        print(rows[-1], file=sys.stderr)
        shutil.rmtree(out)
    return rows


class Clock:
    """Seconds that this process tree could run: times in which it was stopped do not count.

    On a shared machine a measurement may be suspended for another one's sake. A thread looks at
    the clock twenty times a second and takes every gap of more than a second for such a stop.
    """

    def __init__(self) -> None:
        self.stopped = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        before = time.perf_counter()
        while True:
            time.sleep(0.05)
            now = time.perf_counter()
            if now - before > 1:
                self.stopped += now - before
            before = now

    def now(self) -> float:
        """Seconds on this clock."""
        return time.perf_counter() - self.stopped


CLOCK = Clock()


def run_sampled(code: str) -> dict[str, Any]:
    """Run Python in a child; sample the memory of it and its children until it ends."""
    start, anonymous, resident = CLOCK.now(), 0, 0
    child = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while child.poll() is None:
        tree = [child, *children_of(child)]
        anonymous = max(anonymous, sum(anonymous_bytes(p.pid) for p in tree))
        resident = max(resident, sum(resident_bytes(p) for p in tree))
        time.sleep(0.02)
    seconds = CLOCK.now() - start
    if child.returncode:
        raise SystemExit(f"child failed with {child.returncode}: {code}")
    return {
        "peak_anonymous_bytes": anonymous,
        "peak_resident_bytes": resident,
        "seconds": seconds,
        "output": child.stdout.read(),
    }


def children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def copy_seconds(source: Path, to: Path) -> float:
    """Copy a folder's files from a cold disk and sync them; the copy is deleted again."""
    forget(source)
    to.mkdir()
    start = CLOCK.now()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, to / path.name)
        with open(to / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds = CLOCK.now() - start
    shutil.rmtree(to)
    return seconds


def forget(folder: Path) -> None:
    """Let the system drop what it holds of a folder's files in memory."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def small_files(folder: Path) -> int:
    """Bytes of everything that holds no weights."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".safetensors")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
