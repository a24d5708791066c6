"""Run the quick form of the family suite with other versions of what the package depends on.

    python -m scripts.checks.dependency_matrix                   every lane, results kept
    python -m scripts.checks.dependency_matrix newest torch-lowest
    python -m scripts.checks.dependency_matrix lowest --families gemma2
    python -m scripts.checks.dependency_matrix --ci              the two that CI runs, nothing kept

Every tested family's tiny model is exported, run over a wrap of its rings and compared with stock
transformers and an independent float64 computation (`benchmarks/evaluation/families.py --quick`).
Lowest versions are those of pyproject.toml, newest ones those that the registry serves. Results are
kept in benchmarks/results/dependency_matrix.json; docs/models.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lminf_export.bundle.versions import package_version
from lminf_export.runtime.environment import environment
from scripts.checks.overlays import ROOT, bounds, make_overlay, newest

RESULTS = ROOT / "benchmarks" / "results" / "dependency_matrix.json"
LIMIT = 2e-5  # of the logits' range: the contract for float32
ONNX = ("onnx", "onnx-ir", "onnxscript")


def lowest(*packages: str) -> list[str]:
    return [f"{package}=={bounds(package)[0]}" for package in packages]


def newest_of(*packages: str) -> list[str]:
    """Return the newest releases, but for those that the running environment has already."""
    releases = {package: newest(package) for package in packages}
    return [
        f"{package}=={release}"
        for package, release in releases.items()
        if package_version(package).partition("+")[0] != release
    ]


# Lane → what differs from the pinned versions, those of the running environment.
LANES: dict[str, Callable[[], list[str]]] = {
    "pinned": list,
    "transformers-lowest": lambda: lowest("transformers"),
    "transformers-newest": lambda: newest_of("transformers"),
    "onnxruntime-lowest": lambda: lowest("onnxruntime"),
    "onnxruntime-newest": lambda: newest_of("onnxruntime"),
    "torch-lowest": lambda: lowest("torch"),
    # All at once, but torch: one of another version brings gigabytes of CUDA along from PyPI.
    "lowest": lambda: lowest("transformers", "onnxruntime", *ONNX),
    "newest": lambda: newest_of("transformers", "onnxruntime"),
}
CI = ("lowest", "newest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lanes", nargs="*", choices=[*LANES, []], help="default: all")
    parser.add_argument("--ci", action="store_true", help=f"{' and '.join(CI)}; keep no results")
    parser.add_argument("--families", nargs="*", default=[], help="rows; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="lanes at a time")
    parser.add_argument("--envs", type=Path, help="folder of environments, to use them again")
    options = parser.parse_args()
    lanes = options.lanes or list(CI if options.ci else LANES)
    with tempfile.TemporaryDirectory() as scratch:
        envs = options.envs or Path(scratch)
        found = run_lanes({lane: LANES[lane]() for lane in lanes}, envs, options)
    if not options.ci:
        keep(found, whole=not options.families)
    sys.exit(max(report(lane, result) for lane, result in found.items()))


def run_lanes(
    wanted: dict[str, list[str]], envs: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Run lanes side by side; lanes of equal requirements run once."""
    unique = {tuple(requirements): lane for lane, requirements in wanted.items()}
    envs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {
            requirements: pool.submit(run_lane, list(requirements), envs / lane, options.families)
            for requirements, lane in unique.items()
        }
        return {lane: running[tuple(wanted[lane])].result() for lane in wanted}


def run_lane(requirements: list[str], folder: Path, families: list[str]) -> dict[str, Any]:
    """Run the quick suite in an environment; return versions and what each row gave."""
    start = time.perf_counter()
    python = make_overlay(folder, requirements) if requirements else Path(sys.executable)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        command = ["-m", "benchmarks.evaluation.families", "--quick", "--out", out, *families]
        run = subprocess.run(
            [python, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if run.returncode:
            raise SystemExit(f"{' '.join(requirements)}: {run.stderr.strip().splitlines()[-1]}")
        found = json.loads(out.read_text())
    seconds = round(time.perf_counter() - start)
    return {"differs": requirements, "seconds": seconds, **found}


def failures(result: dict[str, Any]) -> dict[str, str]:
    """Return for each row that is not exact what it gave."""
    found = {}
    for name, row in result["rows"].items():
        if "error" in row:
            found[name] = row["error"]
        elif not all(row[kind] < LIMIT for kind in ("stock", "oracle")):
            found[name] = f"off by {row['stock']:.1e} and {row['oracle']:.1e}, limit {LIMIT:.0e}"
    return found


def report(lane: str, result: dict[str, Any]) -> int:
    """Print a lane's outcome; return 1 if a row is not exact."""
    failed, rows = failures(result), result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{lane}: {len(rows) - len(failed)} of {len(rows)} exact ({versions})")
    for name, reason in failed.items():
        print(f"  {name}: {reason}")
    return int(bool(failed) or not rows)


def keep(found: dict[str, Any], *, whole: bool) -> None:
    """Write lanes into the results, beside those of earlier runs.

    Args:
        found: lane → its result.
        whole: every row was run. Else the rows take the place of those of an earlier run with the
            same versions.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"lanes": {}}
    machine = {k: v for k, v in environment().items() if k != "versions"}
    for lane, result in found.items():
        rows = {
            name: {key: value for key, value in row.items() if key != "seconds"}
            for name, row in result["rows"].items()
        }
        before = results["lanes"].get(lane, {})
        if whole:
            results["lanes"][lane] = {**result, "rows": rows, "machine": machine}
        elif before.get("versions") == result["versions"]:
            before["rows"].update(rows)
            before["seconds"] += result["seconds"]
        else:
            raise SystemExit(f"{lane}: these rows ran with other versions; run the whole lane")
    ordered = {lane: results["lanes"][lane] for lane in LANES if lane in results["lanes"]}
    text = json.dumps({"limit": LIMIT, "lanes": ordered}, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
