"""The suite's results as a page of docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.docs.tables import RESULTS, ROOT, table
from scripts.gpu import record

NOT_MEASURED = "not yet measured"
HEAD = """# On a GPU

{state}

`python scripts/gpu_suite.py` builds the kernels for the GPU at hand, checks and times them, and
writes `build/gpu-results/gpu-<device>.json`, which is recorded by being copied to
`benchmarks/results/`; this page is written from there. What was checked without a GPU, against
which source, and what a run has shown and had mended: [gpu_review.md](gpu_review.md).
"""
NEVER_RUN = "**No GPU has run the kernels yet.**"
RUN_BEFORE = """**No GPU has run kernels and suite as they are now.** Recorded below: runs of
earlier ones, with the steps that failed."""
RUN_IN_PART = """**A GPU has run some steps with kernels and suite as they are now**; the others
recorded below are of earlier ones. Steps that failed are named."""
RUN = "Recorded below: runs of kernels and suite as they are now, with the steps that failed."
CHOICES = "The plan beside every other number of splits and every variant of a kernel:"
COUNTERS = """Single kernels by Nsight Compute, which empties the caches before each of them (so
what reads the results of the one before, as combine does, takes longer than in a step):"""
TARGETS = (
    ("decode, B ≥ 8", "≥ 85 % of the copy bandwidth measured beside it"),
    ("decode", "faster than torch's SDPA (flash) and compiled FlexAttention on the same keys"),
    ("decode against full attention at 32k", "≤ 1/6 of the time"),
    ("decode over rings of int8, B ≥ 8", "≤ 0.65 of the time over rings of float16"),
    ("prefill, chunk 1024", "≥ 60 % of the rate of torch's flash SDPA on as many pairs"),
    ("error", "≤ 2× that of torch in the same precision"),
)


def current_page() -> str:
    """Return docs/gpu.md as the committed results make it."""
    results = results_in(RESULTS)
    return page(results, record.digest(ROOT)) if results else empty_page()


def results_in(folder: Path) -> list[dict[str, Any]]:
    """Read the results of every GPU in a folder."""
    paths = sorted(folder.glob("gpu-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def empty_page() -> str:
    """Return the page as long as no GPU was at hand."""
    return f"{HEAD.format(state=NEVER_RUN)}\n{_targets()}\n"


def page(results: list[dict[str, Any]], sources: str) -> str:
    """Return the page of the results of one GPU or several, beside sources of this digest."""
    timed = any(_workloads(result) for result in results)
    steps = [step for result in results for step in result["steps"].values()]
    current = {step["sources"] == sources for step in steps}
    state = RUN_IN_PART if len(current) > 1 else RUN if current == {True} else RUN_BEFORE
    parts = [HEAD.format(state=state), *map(_section, results)]
    return "\n".join(parts if timed else [*parts, _targets() + "\n"])


def _targets() -> str:
    rows = [[what, target, NOT_MEASURED] for what, target in TARGETS]
    return table(["", "target", "measured"], rows, numbers=False)


def _workloads(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result["steps"].get("timing", {}).get("workloads", [])  # type: ignore[no-any-return]


def _section(result: dict[str, Any]) -> str:
    steps, environment = result["steps"], result["environment"]
    rows = [[name, step["status"], _remark(step)] for name, step in steps.items()]
    sources = sorted({step["sources"] for step in steps.values()})
    versions = environment["versions"]
    parts = [
        f"## {environment['gpu']}",
        f"torch {versions['torch']}, CUDA {environment.get('cuda', 'not used')}; kernels and suite "
        f"of digest {', '.join(sources)} (`scripts/gpu/record.py`).",
        table(["step", "", ""], rows, numbers=False),
    ]
    if workloads := _workloads(result):
        head = ["workload", "µs a layer", "of copy bandwidth", "TFLOP/s", "times faster than"]
        parts.append(table(head, map(_row, workloads), numbers=False))
    if compared := steps.get("choices", {}).get("workloads"):
        parts.append(CHOICES)
        head = ["workload", "kernel", "splits", "µs", "fastest choice", "its µs", "the others"]
        rows = [_compared(workload) for workload in compared if "chosen" in workload["seconds"]]
        parts.append(table(head, rows, numbers=False))
    if counted := steps.get("counters", {}).get("workloads"):
        parts.append(COUNTERS)
        head = ["workload", "kernel", "grid", "µs", "memory GB/s", "no warp ready", "registers"]
        rows = [_counted(name, kernel) for name, kernels in counted.items() for kernel in kernels]
        parts.append(table(head, rows, numbers=False))
    return "\n\n".join(parts) + "\n"


def _compared(workload: dict[str, Any]) -> list[str]:
    seconds = dict(workload["seconds"])
    chosen = seconds.pop("chosen")
    # A GPU without memory for more layers has timed the plan alone.
    fastest = min(seconds, key=seconds.__getitem__, default="")
    variants = [name for name in seconds if not name.endswith("splits") and name != fastest]
    return [
        workload["workload"],
        workload["kernel"],
        str(workload["planned_splits"]),
        f"{chosen * 1e6:.1f}",
        fastest,
        f"{seconds[fastest] * 1e6:.1f}" if fastest else "",
        ", ".join(f"{name}: {seconds[name] * 1e6:.1f}" for name in variants),
    ]


def _counted(workload: str, kernel: dict[str, Any]) -> list[str]:
    return [
        workload,
        f"`{kernel['kernel']}<{kernel['of']}>`",
        " × ".join(str(n) for n in kernel["grid"] if n > 1) or "1",
        f"{kernel['seconds'] * 1e6:.1f}",
        f"{kernel['memory_bytes_per_second'] / 1e9:.0f}",
        f"{kernel['cycles_without_an_eligible_warp']:.0%}",
        f"{kernel['registers']:.0f}",
    ]


def _remark(step: dict[str, Any]) -> str:
    if "reason" in step:
        return str(step["reason"]).splitlines()[0]
    if "largest_error_in_units_of_torchs" in step:
        ratio = step["largest_error_in_units_of_torchs"]
        return f"{step['streams']} streams, error at most {ratio:.2f} × torch's"
    if changed := step.get("changed"):
        return f"changed: {'; '.join(changed)}"
    if failures := step.get("failures"):
        named = ": ".join(str(value) for value in failures[0].values())
        return f"{len(failures)} failed; {named}"
    return str(step.get("said", "")).splitlines()[-1] if step.get("said") else ""


def _row(workload: dict[str, Any]) -> list[str]:
    seconds = workload["seconds"]["lambda kernels"]["median"]
    share = workload.get("of_copy_bandwidth")
    faster = workload.get("times_faster_than", {})
    failed = [f"{name}: failed" for name in workload["failed"]]
    compared = [f"{name}: {value:.2f}" for name, value in faster.items()]
    return [
        workload["workload"],
        f"{seconds * 1e6:.1f}",
        f"{share:.0%}" if share else "",
        f"{workload['flops_per_second'] / 1e12:.1f}",
        ", ".join([*compared, *failed]),
    ]
