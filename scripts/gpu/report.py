"""The suite's results as a page of docs."""

from __future__ import annotations

from typing import Any

NOT_MEASURED = "not yet measured"
HEAD = """# On a GPU

`python scripts/gpu_suite.py` builds the kernels for the GPU at hand, checks and times them, and
writes `benchmarks/results/gpu-<device>.json` and this page.
"""
TARGETS = (
    ("decode, B ≥ 8", "≥ 85 % of the copy bandwidth measured beside it"),
    ("decode", "faster than torch's SDPA (flash) and compiled FlexAttention on the same keys"),
    ("decode against full attention at 32k", "≤ 1/6 of the time"),
    ("prefill, chunk 1024", "≥ 60 % of the rate of torch's flash SDPA on as many pairs"),
    ("error", "≤ 2× that of torch in the same precision"),
)


def empty_page() -> str:
    """Return the page as long as no GPU was at hand."""
    rows = [f"| {what} | {target} | {NOT_MEASURED} |" for what, target in TARGETS]
    return "\n".join([HEAD, "| | target | measured |", "|---|---|---|", *rows, ""])


def page(result: dict[str, Any]) -> str:
    """Return the page of a result."""
    steps = result["steps"]
    lines = [HEAD, f"Measured on {result['environment']['gpu']}:", ""]
    lines += ["| step | | |", "|---|---|---|"]
    for name, step in steps.items():
        lines.append(f"| {name} | {step['status']} | {_remark(step)} |")
    workloads = steps.get("timing", {}).get("workloads", [])
    if workloads:
        lines += ["", "| workload | µs a layer | of copy bandwidth | TFLOP/s | times faster than |"]
        lines += ["|---|---|---|---|---|", *(_row(w) for w in workloads)]
    return "\n".join([*lines, ""])


def _remark(step: dict[str, Any]) -> str:
    if "reason" in step:
        return str(step["reason"]).splitlines()[0]
    if "largest_error_in_units_of_torchs" in step:
        ratio = step["largest_error_in_units_of_torchs"]
        return f"{step['streams']} streams, error at most {ratio:.2f} × torch's"
    return str(step.get("said", "")).splitlines()[-1] if step.get("said") else ""


def _row(workload: dict[str, Any]) -> str:
    seconds = workload["seconds"]["lambda kernels"]["median"]
    share = workload.get("of_copy_bandwidth")
    faster = workload.get("times_faster_than", {})
    failed = [f"{name}: failed" for name in workload["failed"]]
    compared = [f"{name}: {value:.2f}" for name, value in faster.items()]
    return (
        f"| {workload['workload']} | {seconds * 1e6:.1f} | {f'{share:.0%}' if share else ''} "
        f"| {workload['flops_per_second'] / 1e12:.1f} | {', '.join([*compared, *failed])} |"
    )
