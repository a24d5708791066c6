"""Build, check and time the kernels on this machine's GPU: one command, everything in order.

python scripts/gpu_suite.py
python scripts/gpu_suite.py --dry-run            what would run, without a GPU
python scripts/gpu_suite.py --emulate --quick    the same code on the block emulation

What the machine lacks is skipped and named. TENSORRT_INCLUDE_DIR adds the plugin and its harness.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.support.result import write_result  # noqa: E402
from lminf_export.runtime.environment import environment  # noqa: E402
from scripts.gpu import report, timings  # noqa: E402
from scripts.gpu.cuda_device import CudaDevice  # noqa: E402
from scripts.gpu.emulated_device import TimedEmulation  # noqa: E402
from scripts.gpu.kernel_library import KernelLibrary  # noqa: E402
from scripts.gpu.steps import STEPS, Suite, all_streams, perform  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.dry_run:
        _print_plan(options.only)
        return 0
    if not options.emulate and not torch.cuda.is_available():
        print(
            "gpu_suite: torch sees no GPU here; --dry-run or --emulate need none", file=sys.stderr
        )
        return 2
    device = TimedEmulation() if options.emulate else CudaDevice.current()
    suite = Suite(device, options.build, quick=options.quick, emulate=options.emulate)
    if options.library:
        suite.library = KernelLibrary(options.library)
    result = {"benchmark": "gpu", "environment": _environment(options.emulate), "steps": {}}
    for name in options.only:
        result["steps"][name] = step = perform(name, suite)
        print(f"{name}: {step['status']} {step.get('reason', '')}", file=sys.stderr, flush=True)
    _write(result, options)
    return int(any(step["status"] == "failed" for step in result["steps"].values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--emulate", action="store_true", help="use the block emulation, no GPU")
    parser.add_argument("--quick", action="store_true", help="few streams, one small timing")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="build folder")
    parser.add_argument("--library", type=Path, help="a liblminf_kernels.so built before")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of the JSON; default benchmarks/results, with docs/gpu.md",
    )
    return parser


def _print_plan(steps: list[str]) -> None:
    for name in steps:
        print(f"{name}: {STEPS[name].__doc__.splitlines()[0]}")  # type: ignore[union-attr]
    print(f"streams: {len(list(all_streams(quick=False)))}")
    for workload in timings.workloads():
        print(f"timing: {workload.name}, {workload.key_bytes / 2**20:.0f} MiB of keys and values")


def _environment(emulate: bool) -> dict[str, Any]:
    found = environment()
    if emulate:
        return {**found, "gpu": "none (block emulation)"}
    major, minor = torch.cuda.get_device_capability()
    return {
        **found,
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "cuda": torch.version.cuda,
    }


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    gpu = re.sub(r"\W+", "-", result["environment"]["gpu"]).strip("-").lower()
    folder = options.results or ROOT / "benchmarks" / "results"
    whole = options.only == list(STEPS) and not options.quick and not options.emulate
    if not whole and options.results is None:
        write_result(None, result)  # a part of the suite is shown, not recorded
        return
    write_result(folder / f"gpu-{gpu}.json", result)
    page = (ROOT / "docs" if options.results is None else folder) / "gpu.md"
    page.write_text(report.page(report.results_in(folder)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
