"""Thousands of damaged files, and what reads them: every error must be one line of a LminfError.

    python -m scripts.checks.mutations --count 12000 --out benchmarks/results/mutations.json

Each mutant runs in a forked process of its own with limits of time and memory, so that a crash of
a native library, a hang and exhausted memory count as escapes as well as exceptions do. Exits with
1 where anything escaped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.support.mutation_targets import Target, make_targets
from lminf_export.errors import LminfError

VERSIONS = ("torch", "transformers", "safetensors", "tokenizers", "onnxruntime", "numpy")
SECONDS, MEMORY = 20, 2 * 2**30
LONGEST = 300


def main() -> int:
    """Run the mutants asked for and write what became of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=12000, help="mutants of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="targets whose names contain this")
    parser.add_argument("--number", type=int, help="run one mutant of --only here, with traceback")
    parser.add_argument("--out", type=Path, help="JSON of the counts and the escapes")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        targets = [t for t in make_targets(Path(place)) if asked.only in t.name]
        if asked.number is not None:
            _act(targets[0], asked.seed, asked.number, Path(place) / "one")
            return 0
        total = sum(target.share for target in targets)
        result = {
            target.name: _run(target, asked.seed, round(asked.count * target.share / total), place)
            for target in targets
        }
    escaped = [x for counts in result.values() for x in counts.pop("escapes")]
    report = {
        "count": sum(sum(counts["outcomes"].values()) for counts in result.values()),
        "seed": asked.seed,
        "limits": {"seconds": SECONDS, "bytes": MEMORY, "characters": LONGEST},
        "escaped": len(escaped),
        "targets": result,
        "escapes": escaped,
        "device": platform.machine(),
        "versions": {"python": platform.python_version(), **{x: version(x) for x in VERSIONS}},
    }
    if asked.out is not None:
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"{report['count']} mutants, {len(escaped)} escaped")
    return 1 if escaped else 0


def _run(target: Target, seed: int, count: int, place: str) -> dict[str, Any]:
    """Run the mutants of one target; return how many ended in which way."""
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    escapes = []
    slowest = 0.0
    for number in range(count):
        folder = Path(place) / "mutant"
        began = time.monotonic()
        outcome, detail = _in_child(lambda: _outcome(target, seed, number, folder))  # noqa: B023
        slowest = max(slowest, time.monotonic() - began)
        shutil.rmtree(folder, ignore_errors=True)
        outcomes[outcome] += 1
        if outcome == "refused":
            reasons[re.sub(r"[\d.]+|'[^']*'|/\S+", "…", detail)[:60]] += 1
        if outcome not in ("accepted", "refused"):
            escapes.append({"target": target.name, "number": number, outcome: detail})
            print(f"{target.name} {number}: {outcome}: {detail}", file=sys.stderr, flush=True)
    print(f"{target.name}: {dict(outcomes)}, slowest {slowest:.1f} s", flush=True)
    return {
        "outcomes": dict(sorted(outcomes.items())),
        "kinds of refusals": len(reasons),
        "commonest refusals": dict(reasons.most_common(8)),
        "escapes": escapes,
    }


def _act(target: Target, seed: int, number: int, folder: Path) -> None:
    dice = random.Random(f"{seed} {target.name} {number}")
    shutil.copytree(dice.choice(target.folders), folder)
    target.change(folder, dice)
    target.act(folder, number)


def _outcome(target: Target, seed: int, number: int, folder: Path) -> tuple[str, str]:
    try:
        _act(target, seed, number, folder)
    except LminfError as error:
        message = str(error)
        if len(message) > LONGEST or "\n" in message:
            return "long message", message[:1000]
        return "refused", message
    except BaseException as error:  # noqa: BLE001 - every other end is what this looks for
        frame = traceback.extract_tb(error.__traceback__)
        own = next((f for f in reversed(frame) if "lminf_export" in f.filename), frame[-1])
        place = f"{Path(own.filename).name}:{own.lineno}"
        return f"escaped {type(error).__name__}", f"{str(error)[:200]} at {place}"
    return "accepted", ""


def _in_child(work: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Run work in a forked process with limits; say how the process ended if it says nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + 4 * SECONDS  # of waiting, beside the limit of its own work
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    if said:
        kind, detail = json.loads(said)
        return kind, detail
    ended = os.waitstatus_to_exitcode(status)
    return ("crash", signal.Signals(-ended).name if ended < 0 else f"exit code {ended}")


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
