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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.support.mutation_targets import Target, make_targets
from lminf_export.errors import LminfError

VERSIONS = ("torch", "transformers", "safetensors", "tokenizers", "onnxruntime", "numpy")
# Of CPU time, of waiting for a busy machine too, of memory beyond what the libraries take.
SECONDS, WAITING, MEMORY = 20, 600, 2 * 2**30
LONGEST = 300


def main() -> int:
    """Run the mutants asked for and write what became of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=12000, help="mutants of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--each", type=int, help="model types of each kind; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at the same time")
    parser.add_argument("--only", default="", help="targets whose names match this")
    parser.add_argument("--number", type=int, help="run one mutant of --only here, with traceback")
    parser.add_argument(
        "--again", action="store_true", help="run those that escaped in --out again"
    )
    parser.add_argument("--out", type=Path, help="JSON of the counts and the escapes")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        every = make_targets(Path(place), asked.each)
        targets = [target for target in every if re.search(asked.only, target.name)]
        if asked.number is not None:
            _act(targets[0], asked.seed, asked.number, Path(place) / "one")
            return 0
        result = {}
        if asked.again:
            before = json.loads(asked.out.read_text())["targets"]
            result = {t.name: _again(t, before[t.name], place) for t in targets}
            _write(asked.out, result, True)
            targets = []
        for target in targets:
            count = max(1, round(asked.count * target.share / sum(x.share for x in every)))
            result[target.name] = _run(target, asked.seed, range(count), place, asked.jobs)
            if asked.out is not None:
                _write(asked.out, result, asked.only != "")
    escaped = sum(len(counts["escapes"]) for counts in result.values())
    print(f"{sum(counts['mutants'] for counts in result.values())} mutants, {escaped} escaped")
    return 1 if escaped else 0


def _again(target: Target, before: dict[str, Any], place: str) -> dict[str, Any]:
    """Run the mutants that escaped once more, after a change; their numbers stay in the report."""
    numbers = [escape["number"] for escape in before["escapes"]]
    found = _run(target, before["seed"], numbers, place, 1)
    outcomes = Counter(before["outcomes"])
    for escape in before["escapes"]:
        outcomes[next(key for key in escape if key not in ("target", "number"))] -= 1
    outcomes.update(found["outcomes"])
    kept = {name: count for name, count in sorted(outcomes.items()) if count}
    repeated = [*before.get("run again after a correction", []), *numbers]
    return {
        **before,
        "outcomes": kept,
        "escapes": found["escapes"],
        "run again after a correction": repeated,
    }


def _write(path: Path, result: dict[str, Any], keeps_others: bool) -> None:
    """Write the report; a run of some targets leaves what an earlier one says of the others."""
    before = json.loads(path.read_text())["targets"] if keeps_others and path.exists() else {}
    targets = dict(sorted({**before, **result}.items()))
    report = {
        "mutants": sum(counts["mutants"] for counts in targets.values()),
        "escaped": sum(len(counts["escapes"]) for counts in targets.values()),
        "limits": {"CPU seconds": SECONDS, "bytes": MEMORY, "characters": LONGEST},
        "targets": targets,
        "device": platform.machine(),
        "versions": {"python": platform.python_version(), **{x: version(x) for x in VERSIONS}},
    }
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _run(
    target: Target, seed: int, numbers: Sequence[int], place: str, jobs: int
) -> dict[str, Any]:
    """Run the mutants of one target; return how many ended in which way."""
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    escapes = []
    live: list[_Child] = []
    waiting = list(numbers)[::-1]
    while waiting or live:
        while waiting and len(live) < jobs:
            number = waiting.pop()
            live.append(_Child(target, seed, number, Path(place) / f"mutant-{number}"))
        ended = [child for child in live if child.has_ended()]
        live = [child for child in live if child not in ended]
        for child in ended:
            outcome, detail = child.outcome()
            outcomes[outcome] += 1
            if outcome == "refused":
                reasons[re.sub(r"[\d.]+|'[^']*'|/\S+", "…", detail)[:60]] += 1
            elif outcome != "accepted":
                escapes.append({"target": target.name, "number": child.number, outcome: detail})
                print(f"{target.name} {child.number}: {outcome}: {detail}", file=sys.stderr)
                sys.stderr.flush()
        time.sleep(0 if ended else 0.005)
    print(f"{target.name}: {dict(outcomes)}", flush=True)
    return {
        "mutants": len(numbers),
        "seed": seed,
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


class _Child:
    """A forked process with limits that runs one mutant."""

    def __init__(self, target: Target, seed: int, number: int, folder: Path) -> None:
        self.number, self._folder = number, folder
        self._reader, writer = os.pipe()
        self._deadline = time.monotonic() + WAITING
        self._process = os.fork()
        if self._process == 0:
            _limit()
            os.write(writer, json.dumps(_outcome(target, seed, number, folder)).encode())
            os._exit(0)
        os.close(writer)
        self._status = 0

    def has_ended(self) -> bool:
        """Whether the process has ended; one that takes too long is ended here."""
        if time.monotonic() > self._deadline:
            os.kill(self._process, signal.SIGKILL)
            _, self._status = os.waitpid(self._process, 0)
            return True
        done, self._status = os.waitpid(self._process, os.WNOHANG)
        return done != 0

    def outcome(self) -> tuple[str, str]:
        """Return what the process said, or how it ended if it said nothing."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with os.fdopen(self._reader, "rb") as file:
            said = file.read()
        if said:
            kind, detail = json.loads(said)
            return kind, detail
        code = os.waitstatus_to_exitcode(self._status)
        return "crash", signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _limit() -> None:
    """Silence this process, and limit its time and memory."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
