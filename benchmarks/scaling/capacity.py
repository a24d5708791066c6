"""A capacity plan of a bundle, with the speed of a server that was measured: docs/scaling.md.

    python -m benchmarks.scaling.capacity BUNDLE \\
        --parameters benchmarks/results/scaling_parameters.json \\
        --out benchmarks/results/scaling_capacity.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.scaling.settings import measured as read_parameters
from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.capacity.options import CapacityOptions, ReplicaSpeed
from lminf_export.capacity.plan import plan_capacity
from lminf_export.capacity.sizes import StateSizes
from lminf_export.errors import InputError
from lminf_export.runtime.environment import describe_bundle, environment

SESSIONS, MEMORY = 1_000_000, 4 << 30


def main() -> int:
    """Plan and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--parameters", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    _, _, measured = read_parameters(asked.parameters)
    speed = speed_of(measured)
    options = CapacityOptions(slots=len(measured["step_ms"]), sessions=SESSIONS, memory=MEMORY)
    manifest = Bundle.open(asked.bundle).manifest
    if not is_alike(manifest, measured):
        raise InputError(
            f"{asked.parameters} was measured with another bundle than {asked.bundle}: give that "
            "one, or measure this one (python -m benchmarks.scaling.parameters)"
        )
    result = {
        "benchmark": "scaling.capacity",
        "environment": environment(),
        "measured_on": measured["environment"]["device"],
        "threads": measured["threads"],
        "bundle": describe_bundle(manifest),
        "measured_bundle": measured["bundle"],
        "plan": plan_capacity(asked.bundle, options, speed=speed).to_dict(),
    }
    write_result(asked.out, result)
    return 0


def is_alike(manifest: Manifest, measured: dict[str, Any]) -> bool:
    """Tell whether a bundle is of the model and the caches that were measured.

    Its hash may be another one: an export by a later version writes it anew.
    """
    sizes = StateSizes.of(manifest)
    found = {**describe_bundle(manifest), "kept_bytes": sizes.kept_bytes(sizes.full_at)}
    wanted = {**measured["bundle"], "kept_bytes": measured["kept_bytes"]}
    return all(found[name] == wanted[name] for name in found.keys() - {"bundle_sha256"})


def speed_of(measured: dict[str, Any]) -> ReplicaSpeed:
    """Return the speed of a server with all slots busy, in whole tokens."""
    slots, length = len(measured["step_ms"]), max(map(int, measured["prompt_ms"]))
    return ReplicaSpeed(
        tokens_per_second=round(slots * 1e3 / measured["step_ms"][str(slots)]),
        prompt_tokens_per_second=round(length * 1e3 / measured["prompt_ms"][str(length)]),
        source="measured",
    )


if __name__ == "__main__":
    run_script(main)
