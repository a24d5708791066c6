"""A simulated fleet of 1,000 servers and a million sessions, in several ways to keep the sessions.

This is a simulation: the times of one server are measured (benchmarks.scaling.parameters), the
rest is assumed, and the result names both. The clock of the simulation is simpy's.

    python -m benchmarks.scaling.simulate --parameters benchmarks/results/scaling_parameters.json \\
        --out benchmarks/results/scaling_simulation.json
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import simpy

from benchmarks.scaling.fleet import Fleet
from benchmarks.scaling.settings import FleetSettings, Sizes, Times, measured
from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.environment import environment

# Name → what differs from the first.
CALM = {"lifetime": None, "drain_share": 0.0}
# Where a history would be read again, a session stays with its server, however busy that is.
REREAD = {"elsewhere": "reread", "load_bound": 1e9}
SCENARIOS: dict[str, dict[str, Any]] = {
    "store": {},
    "store, nothing fails": CALM,
    "store, any server": {"routing": "random"},
    "full caches in a store": {"cache": "full"},
    "no store": REREAD,
    "no store, nothing fails": {**REREAD, **CALM},
}
# What an option assumes instead of the committed run's: its type and that run's value. Scenarios
# differ in the rest.
ASSUMED = {
    field.name: (int if field.type == "int" else float, field.default)
    for field in fields(FleetSettings)
    if field.type in ("int", "float", "float | None")
}
NOTE = (
    "A simulation, not a measurement of a fleet. Measured: the times and bytes under `times` and "
    "`sizes`. Assumed: everything under `settings`. Servers' networks and the store are never "
    "overloaded: transfers take their latency and their bytes at the full bandwidth. Full caches "
    "cost nothing here but their bytes, which are copied, saved and checked at the rate that was "
    "measured for states: decoding is as fast as with bounded ones."
)


def main() -> int:
    """Simulate and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=Path, required=True)
    for name, (kind, default) in ASSUMED.items():
        shown = "as many as were measured" if name == "slots" else default
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, help=f"see FleetSettings; default: {shown}"
        )
    parser.add_argument("--jobs", type=int, default=1, help="scenarios simulated at once")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    as_integer("jobs", asked.jobs, 1)
    times, sizes, parameters = measured(asked.parameters)
    given = {name: getattr(asked, name) for name in ASSUMED}
    named = {name: value for name, value in given.items() if value is not None}
    settings = FleetSettings(**{"slots": len(times.step), **named})
    runs = {name: replace(settings, **changes) for name, changes in SCENARIOS.items()}
    with ProcessPoolExecutor(asked.jobs) as pool:
        found = dict(
            zip(
                runs,
                pool.map(simulated, runs.values(), [times] * len(runs), [sizes] * len(runs)),
                strict=True,
            )
        )
    result = {
        "benchmark": "scaling.simulate",
        "note": NOTE,
        "environment": environment(),
        "simpy": simpy.__version__,
        "measured_on": parameters["environment"]["device"],
        "model": parameters["bundle"]["model"],
        "times": asdict(times),
        "sizes": asdict(sizes),
        "settings": asdict(settings),
        "scenarios": {name: {"differs": SCENARIOS[name], **found[name]} for name in runs},
    }
    write_result(asked.out, result)
    return 0


def simulated(settings: FleetSettings, times: Times, sizes: Sizes) -> dict[str, Any]:
    """Run one fleet; return its counts, which depend on the seed and on nothing else."""
    start = time.process_time()
    fleet = Fleet(settings, times, sizes)
    counts = fleet.run()
    return {
        "events": dict(sorted(counts.events.items())),
        "first_token": counts.latencies(),
        "slots": settings.hosts * settings.slots,
        "busy_slots": round(fleet.busy_slots, 1),
        "network_bytes": dict(sorted(counts.network_bytes.items())),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


if __name__ == "__main__":
    run_script(main)
