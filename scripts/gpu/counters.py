"""Hardware counters of single kernels, from what NVIDIA's Nsight Compute (ncu) prints.

    ncu --clock-control none --set basic --page details … > details.txt
    python -m scripts.gpu.counters WORKLOAD=details.txt … --into gpu-nvidia-h200.json

The step `counters` of the suite does the same by itself. ncu empties the caches before every
kernel, so one that reads what the one before it wrote takes longer here than in a step.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.gpu import record

# ncu's name and unit of a metric → the name here and the factor to it.
METRICS: dict[tuple[str, str], tuple[str, float]] = {
    ("Duration", "ns"): ("seconds", 1e-9),
    ("Duration", "us"): ("seconds", 1e-6),
    ("Duration", "ms"): ("seconds", 1e-3),
    ("Memory Throughput", "Mbyte/s"): ("memory_bytes_per_second", 1e6),
    ("Memory Throughput", "Gbyte/s"): ("memory_bytes_per_second", 1e9),
    ("Memory Throughput", "Tbyte/s"): ("memory_bytes_per_second", 1e12),
    ("DRAM Throughput", "%"): ("memory_busy", 0.01),
    ("Compute (SM) Throughput", "%"): ("multiprocessors_busy", 0.01),
    ("Achieved Occupancy", "%"): ("achieved_occupancy", 0.01),
    ("Registers Per Thread", "register/thread"): ("registers", 1.0),
    ("No Eligible", "%"): ("cycles_without_an_eligible_warp", 0.01),
    ("SM Frequency", "Ghz"): ("hertz", 1e9),
    ("SM Frequency", "Mhz"): ("hertz", 1e6),
}
_KERNEL = re.compile(r"^  (?:void )?(\w+Kernel)<([^>]*)>\(.*?\) \(([\d, ]+)\)x\(([\d, ]+)\)")
_METRIC = re.compile(r"^    (\S.*?)\s{2,}(\S+)\s+([\d,.]+)\s*$")


def read_details(text: str) -> list[dict[str, Any]]:
    """Return every kernel that ncu's page `details` describes, in the order they ran.

    Returns:
        Name, template arguments, grid, block, and of METRICS those that the page has, in SI units.
    """
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        if kernel := _KERNEL.match(line):
            name, arguments, grid, block = kernel.groups()
            sizes = [[int(n) for n in dims.split(",")] for dims in (grid, block)]
            found.append({"kernel": name, "of": arguments, "grid": sizes[0], "block": sizes[1]})
        elif found and (metric := _METRIC.match(line)):
            label, unit, value = metric.groups()
            if (label, unit) in METRICS:
                key, factor = METRICS[label, unit]
                found[-1][key] = float(value.replace(",", "")) * factor
    return found


def by_kernel(launches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians for each kernel and grid, and how many launches there were."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for launch in launches:
        key = (launch["kernel"], launch["of"], str(launch["grid"]), str(launch["block"]))
        groups.setdefault(key, []).append(launch)
    return [_median(group) for group in groups.values()]


def _median(group: list[dict[str, Any]]) -> dict[str, Any]:
    result = {k: v for k, v in group[0].items() if not isinstance(v, float)}
    result["launches"] = len(group)
    for key in (k for k, v in group[0].items() if isinstance(v, float)):
        values = sorted(launch[key] for launch in group if key in launch)
        result[key] = values[len(values) // 2]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("details", nargs="+", help="WORKLOAD=FILE of ncu's page details")
    parser.add_argument("--into", type=Path, required=True, help="the result of the same run")
    options = parser.parse_args()
    workloads = {}
    for given in options.details:
        name, _, path = given.rpartition("=")
        workloads[name] = by_kernel(read_details(Path(path).read_text(encoding="utf-8")))
    result = record.read(options.into)
    build = result["steps"]["build"]
    result["steps"]["counters"] = {
        "status": "ok",
        "workloads": workloads,
        "sources": build["sources"],
        "quick": False,
    }
    record.write(options.into, result)


if __name__ == "__main__":
    main()
