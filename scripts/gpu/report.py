"""The suite's results as a page of docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.docs.tables import RESULTS, table

NOT_MEASURED = "not yet measured"
HEAD = """# On a GPU

`python scripts/gpu_suite.py` builds the kernels for the GPU at hand, checks and times them, and
writes `benchmarks/results/gpu-<device>.json` and this page.
"""
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
    return page(results) if results else empty_page()


def results_in(folder: Path) -> list[dict[str, Any]]:
    """Read the results of every GPU in a folder."""
    paths = sorted(folder.glob("gpu-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def empty_page() -> str:
    """Return the page as long as no GPU was at hand."""
    rows = [[what, target, NOT_MEASURED] for what, target in TARGETS]
    return f"{HEAD}\n{table(['', 'target', 'measured'], rows, numbers=False)}\n"


def page(results: list[dict[str, Any]]) -> str:
    """Return the page of the results of one GPU or several."""
    return "\n".join([HEAD, *map(_section, results)])


def _section(result: dict[str, Any]) -> str:
    steps = result["steps"]
    rows = [[name, step["status"], _remark(step)] for name, step in steps.items()]
    parts = [
        f"Measured on {result['environment']['gpu']}:",
        table(["step", "", ""], rows, numbers=False),
    ]
    workloads = steps.get("timing", {}).get("workloads", [])
    if workloads:
        head = ["workload", "µs a layer", "of copy bandwidth", "TFLOP/s", "times faster than"]
        parts.append(table(head, map(_row, workloads), numbers=False))
    return "\n\n".join(parts) + "\n"


def _remark(step: dict[str, Any]) -> str:
    if "reason" in step:
        return str(step["reason"]).splitlines()[0]
    if "largest_error_in_units_of_torchs" in step:
        ratio = step["largest_error_in_units_of_torchs"]
        return f"{step['streams']} streams, error at most {ratio:.2f} × torch's"
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
