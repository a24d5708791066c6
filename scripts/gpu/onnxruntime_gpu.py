"""onnxruntime-gpu end to end, in stages: each runs by itself and writes one JSON file.

    python -m scripts.gpu.onnxruntime_gpu --stage all --results DIR
    python -m scripts.gpu.onnxruntime_gpu --stage decode-7b --results DIR --work DIR
    python -m scripts.gpu.onnxruntime_gpu --list

A stage that has succeeded is not run again unless --force is given; what a stage has found so far
is in its file while it runs. Each stage of "all" runs in a process of its own. With --provider cpu
the same code runs without a GPU, over tiny models: for rehearsals, its figures say nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.gpu.processes import run_limited

if TYPE_CHECKING:
    from lminf_export.runtime.options import Provider

ROOT = Path(__file__).resolve().parents[2]
# Stage → module and function, and the seconds after which it is given up on an H200.
STAGES: dict[str, tuple[str, str, int]] = {
    "environment": ("ort_machine", "environment", 60),
    "build": ("ort_machine", "build", 300),
    "operator": ("ort_small", "operator", 90),
    "kernels": ("ort_small", "kernels", 240),
    "demo": ("ort_small", "demo", 240),
    "twin": ("ort_small", "twin", 240),
    "bundle-8b": ("ort_large", "bundle_8b", 240),
    "decode-8b": ("ort_large", "decode_8b", 300),
    "peers-8b": ("ort_large", "peers_8b", 400),
    "bundle-7b": ("ort_large", "bundle_7b", 240),
    "decode-7b": ("ort_large", "decode_7b", 300),
    "peers-7b": ("ort_large", "peers_7b", 400),
}
_SHARED_MEMORY = Path("/dev/shm")
_CPU_PATIENCE = 8
_ROOM = 40 * 2**30  # for weights of two models


class SkipStage(Exception):
    """The machine lacks what a stage needs; the message names it."""


@dataclass
class Run:
    """Settings of a run, and the record of one stage.

    Attributes:
        stage: its name.
        results: folder of the JSON files.
        work: folder of models and bundles.
        build: folder of the CMake build.
        provider: "cpu" or "cuda".
        quick: smaller models and fewer tokens.
        found: the record so far.
    """

    stage: str
    results: Path
    work: Path
    build: Path
    provider: Provider = "cuda"
    quick: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The stage's file."""
        return self.results / f"ort-{self.stage}.json"

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to run on."""
        return self.provider == "cuda"

    def library(self) -> Path:
        """Return the operator's library that `build` made.

        Raises:
            SkipStage: it was not built.
        """
        found = ROOT / "lminf_export" / "lib" / "liblminf_ort.so"
        if not found.is_file():
            raise SkipStage(f"{found.name} is not in lminf_export/lib: run the stage build first")
        return found

    def note(self, **values: Any) -> None:
        """Add to the record and write it, so that a stage that is killed leaves what it had."""
        self.found.update(values)
        self.results.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)
        for key, value in values.items():
            text = json.dumps(value)
            print(f"{self.stage}: {key} = {text[:300]}", flush=True)


def perform(run: Run) -> str:
    """Run one stage and return its status: "ok", "failed" or "not run"."""
    module, function, _ = STAGES[run.stage]
    run.found = {"stage": run.stage, "status": "running", "provider": run.provider}
    start = time.perf_counter()
    try:
        problems = getattr(importlib.import_module(f"scripts.gpu.{module}"), function)(run)
        run.found["problems"] = problems
        status = "failed" if problems else "ok"
    except SkipStage as reason:
        run.found["reason"] = str(reason)
        status = "not run"
    except Exception as error:  # noqa: BLE001 - the record says what was wrong
        run.found["reason"] = f"{type(error).__name__}: {error}"[:2000]
        run.found["traceback"] = traceback.format_exc()[-4000:]
        status = "failed"
    run.note(status=status, seconds=round(time.perf_counter() - start, 2))
    return status


def is_done(run: Run) -> bool:
    """Return whether a stage has succeeded before."""
    if not run.path.is_file():
        return False
    found = json.loads(run.path.read_text(encoding="utf-8"))
    return found["status"] == "ok" and found["provider"] == run.provider


def perform_all(runs: list[Run], arguments: list[str]) -> bool:
    """Run stages in processes of their own; return whether all succeeded."""
    statuses = {}
    for run in runs:
        limit = STAGES[run.stage][2] * (1 if run.on_gpu else _CPU_PATIENCE)
        module = ["-m", "scripts.gpu.onnxruntime_gpu", "--stage", run.stage]
        status = run_limited([sys.executable, *module, *arguments], limit)
        if status is None and run.path.is_file():  # what it had found stays
            run.found = json.loads(run.path.read_text(encoding="utf-8"))
            run.note(status="failed", reason=f"ended after {limit} s")
        statuses[run.stage] = {None: f"ended after {limit} s", 0: "ok"}.get(status, "failed")
    print(json.dumps(statuses, indent=1))
    return all(status == "ok" for status in statuses.values())


def default_work() -> Path:
    """Return a folder in memory where there is room for the weights, else in the current one."""
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > _ROOM:
        return _SHARED_MEMORY / "ort-gpu"
    return Path("build") / "ort-gpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="all", help='a name of --list, several with ",", or all')
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    parser.add_argument("--results", type=Path, default=Path("build/gpu-results"))
    parser.add_argument("--work", type=Path, default=default_work(), help="models and bundles")
    parser.add_argument("--build", type=Path, default=Path("build/gpu"))
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer tokens")
    parser.add_argument("--force", action="store_true", help="run again what has succeeded")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{name}: at most {limit} s" for name, (_, _, limit) in STAGES.items()))
        return
    names = list(STAGES) if given.stage == "all" else given.stage.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"--stage {unknown[0]}: must be all or of {', '.join(STAGES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settings = (given.results, given.work, given.build, given.provider, given.quick)
    runs = [Run(name, *settings) for name in names]
    left = [run for run in runs if given.force or not is_done(run)]
    if not left:
        print("nothing to do: every stage has succeeded (--force runs them again)")
    elif len(runs) == 1:
        sys.exit(0 if perform(left[0]) == "ok" else 1)
    else:
        arguments = ["--results", str(given.results), "--work", str(given.work), "--force"]
        arguments += ["--build", str(given.build), "--provider", given.provider]
        arguments += ["--quick"] if given.quick else []
        sys.exit(0 if perform_all(left, arguments) else 1)


if __name__ == "__main__":
    main()
