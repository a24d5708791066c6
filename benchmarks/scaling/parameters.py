"""The times of one server that the simulation of a fleet is made of, measured on this machine.

Steps of 1 … B streams with full rings; prompts of some lengths, read behind a full ring; a
session's state as a snapshot and back; and the same saved to a shared store and loaded from it,
as a server does it: sealed, on the disk, checked. Measurements take turns; medians of the rounds.

    python -m benchmarks.scaling.parameters BUNDLE --out benchmarks/results/scaling_parameters.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.bench.child import fresh_process
from lminf_export.capacity.sizes import StateSizes
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.parking.session_store import SessionStore
from lminf_export.runtime.snapshot import Snapshot

FAR = 10**6
STEPS = 20
PROMPTS = (16, 64, 256)  # of the last one, chunks are made
STARTS = 3


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    for name in ("slots", "rounds"):
        as_integer(name, getattr(asked, name), 1)
    lm = load(asked.bundle, threads=asked.threads)
    sizes = StateSizes.of(lm.bundle.manifest)
    starts = [
        fresh_process(lm.bundle.path, "cpu", asked.threads, AUTO)[0].process for _ in range(STARTS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = SessionStore(Path(folder) / "store", ["of this measurement only, " * 2])
        result = {
            "benchmark": "scaling.parameters",
            "environment": environment(),
            "bundle": describe_bundle(lm.bundle.manifest),
            "threads": asked.threads,
            "rounds": asked.rounds,
            "start_seconds": round(statistics.median(starts), 3),
            "full_at": sizes.full_at,
            "kept_bytes": sizes.kept_bytes(sizes.full_at),
            "full_cache_bytes_per_token": full_cache_bytes_per_token(lm),
            **medians(steps(lm, asked.slots), asked.rounds),
            **medians(prompts(lm), asked.rounds),
            "states": [state(lm, store, count, asked.rounds) for count in lengths(sizes)],
        }
    write_result(asked.out, result)
    return 0


def lengths(sizes: StateSizes) -> list[int]:
    """Tokens that the parked sessions have read: three that still grow, and one that is full."""
    return [sizes.full_at // part for part in (8, 4, 2, 1)]


def full_cache_bytes_per_token(lm: LanguageModel) -> int:
    """Return by how much the unmodified model's cache grows with each token of a long stream."""
    manifest = lm.bundle.manifest
    return manifest.full_cache_bytes(FAR + 1) - manifest.full_cache_bytes(FAR)


def medians(works: dict[str, dict[int, Callable[[], float]]], rounds: int) -> dict[str, Any]:
    """Return the median milliseconds of each work; all take turns."""
    found: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in table} for name, table in works.items()
    }
    for _ in range(rounds):
        for name, table in works.items():
            for size, work in table.items():
                found[name][size].append(work())
    return {
        name: {str(size): round(statistics.median(times), 4) for size, times in table.items()}
        for name, table in found.items()
    }


def steps(lm: LanguageModel, slots: int) -> dict[str, dict[int, Callable[[], float]]]:
    """Steps of decoding by the number of streams."""
    return {"step_ms": {count: stepping(lm, count) for count in range(1, slots + 1)}}


def stepping(lm: LanguageModel, count: int) -> Callable[[], float]:
    state = lm.new_state(count)
    lm.session.stand_at(state, FAR)
    lm.session.fill(state, np.random.default_rng(count))
    token = np.ones((count, 1), np.int64)

    def work() -> float:
        lm.forward(token, state, logits="last")
        return (
            timed(lambda: [lm.forward(token, state, logits="last") for _ in range(STEPS)]) / STEPS
        )

    return work


def prompts(lm: LanguageModel) -> dict[str, dict[int, Callable[[], float]]]:
    """Reading of one prompt by its length."""
    return {"prompt_ms": {count: reading(lm, count) for count in PROMPTS}}


def reading(lm: LanguageModel, count: int) -> Callable[[], float]:
    state = lm.new_state()
    lm.session.stand_at(state, FAR)
    lm.session.fill(state, np.random.default_rng(count))
    ids = np.random.default_rng(0).integers(0, lm.vocab_size, (1, count))
    return lambda: timed(lambda: lm.forward(ids, state, logits="last"))


def state(lm: LanguageModel, store: SessionStore, tokens: int, rounds: int) -> dict[str, Any]:
    """Return a parked session's bytes, and milliseconds to park and to resume it."""
    one = lm.new_state()
    lm.forward(np.arange(tokens)[None] % lm.vocab_size, one, logits="none")
    held = [one.snapshot()]
    name = f"a session of {tokens} tokens"

    def save() -> None:
        store.save(name, store.latest(name) + 1, held[0])

    def snapshot() -> None:
        held[0] = one.snapshot(into=held[0])

    works: dict[str, Callable[[], Any]] = {
        "snapshot_ms": snapshot,
        "restore_ms": lambda: one.restore(held[0]),
        "save_ms": save,
        "load_ms": lambda: store.load(name, lm),
        "latest_ms": lambda: store.latest(name),
    }
    found = medians({n: {0: lambda w=w: timed(w)} for n, w in works.items()}, rounds)  # type: ignore[misc]
    return {
        "tokens": tokens,
        "bytes": held[0].nbytes,
        "stored_bytes": stored_bytes(held[0]),
        **{key: table["0"] for key, table in found.items()},
    }


def stored_bytes(snapshot: Snapshot) -> int:
    """Bytes of a state's file, without seal and record."""
    return len(snapshot.to_bytes())


def timed(work: Callable[[], Any]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    run_script(main)
