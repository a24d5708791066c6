"""Build, check and time the kernels on this machine's GPU: one command, everything in order.

python scripts/gpu_suite.py                      what is not yet recorded of these sources
python scripts/gpu_suite.py --dry-run            what would run, without a GPU
python scripts/gpu_suite.py --emulate --quick    the same code on the block emulation

Every step is a process of its own with a limit of time, since a fault of a kernel stays in the
process that had it, and results are written whenever one ends. What was recorded as right of the
same sources is not run again, so a call that was cut short goes on where it stopped. What the
machine lacks is skipped and named. TENSORRT_INCLUDE_DIR adds the plugin and its harness. This file
itself needs nothing but Python.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu import record, report  # noqa: E402
from scripts.gpu.plan import BY_DEFAULT, PLAN, groups  # noqa: E402
from scripts.gpu.processes import run_step  # noqa: E402

MACHINE_LIMIT = 120.0  # seconds in which torch must have been imported and have found the GPU


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.dry_run:
        for name in options.only:
            print(f"{name}: {PLAN[name].does}; at most {PLAN[name].limit:.0f} s")
        return 0
    end = time.monotonic() + options.seconds
    folder = options.results
    folder.mkdir(parents=True, exist_ok=True)
    machine = run_step("machine", MACHINE_LIMIT, folder, _arguments(options))
    if machine["status"] != "ok":
        print(f"gpu_suite: {machine['reason']}", file=sys.stderr)
        return 2
    path, sources = folder / record.file_name(machine["environment"]["gpu"]), record.digest(ROOT)
    steps = {} if options.again else record.read(path)["steps"]
    result = {"benchmark": "gpu", "environment": machine["environment"], "steps": steps}
    wanted = [
        name
        for name in options.only
        if not record.holds(steps.get(name), sources, quick=options.quick)
    ]
    for group in groups(wanted):
        left = end - time.monotonic()
        if left <= 0:
            print(f"not begun, the time is over: {' '.join(group)}", file=sys.stderr)
            continue
        for name, step in _run(group, left, folder, options):
            steps[name] = {**step, "sources": sources, "quick": options.quick}
            print(f"{name}: {step['status']} {step.get('reason', '')}", file=sys.stderr, flush=True)
        record.write(path, result)
        page = report.page([result], sources)
        (folder / "gpu.md").write_text(page, encoding="utf-8")
    print(path)
    return int(any(steps[name]["status"] == "failed" for name in options.only if name in steps))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--emulate", action="store_true", help="use the block emulation, no GPU")
    parser.add_argument("--quick", action="store_true", help="few streams, one small timing")
    parser.add_argument("--again", action="store_true", help="forget what was recorded before")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end everything after this"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PLAN, default=list(BY_DEFAULT), metavar="STEP",
        help=f"of {', '.join(PLAN)}; default: all but sanitizer",
    )  # fmt: skip
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="build folder")
    parser.add_argument("--library", type=Path, help="a liblminf_kernels.so built before")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "build" / "gpu-results",
        help="folder of the JSON, its page and the logs; default build/gpu-results",
    )
    return parser


def _arguments(options: argparse.Namespace) -> list[str]:
    given = ["--build", str(options.build)]
    given += ["--library", str(options.library)] * bool(options.library)
    return given + ["--emulate"] * options.emulate + ["--quick"] * options.quick


def _run(
    group: list[str], left: float, folder: Path, options: argparse.Namespace
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Run steps side by side and return each with its result."""

    def run(name: str) -> dict[str, Any]:
        # What the emulation takes says nothing, and depends on this machine alone.
        limit = left if options.emulate else min(PLAN[name].limit, left)
        return run_step(name, limit, folder, _arguments(options))

    with ThreadPoolExecutor(len(group)) as pool:
        return list(zip(group, pool.map(run, group), strict=True))


if __name__ == "__main__":
    sys.exit(main())
