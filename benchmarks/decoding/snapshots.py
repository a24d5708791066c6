"""The cost of a state as a value: snapshot, restore, fork, save and load beside plain copies.

Each is measured in turn with a copy of the same bytes: into memory that was written before, into
fresh memory, or with a plain file. The state is one stream of several in a state whose rings are
full: of the bundle given, and of a larger shape of float16 whose caches alone are made.

    python -m benchmarks.decoding.snapshots BUNDLE --out benchmarks/results/snapshots.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.result import write_result
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.runtime.cache import State
from lminf_export.runtime.environment import environment
from lminf_export.runtime.load import load
from lminf_export.runtime.onnxruntime_cuda import CudaGraphs
from lminf_export.runtime.onnxruntime_state import OnnxRuntimeState, new_bound
from lminf_export.runtime.snapshot import Snapshot

STREAMS, FORKS = 4, 8
LAYERS, HEADS, ROW, WINDOW, SINKS, CHUNK = 16, 4, 128, 2048, 4, 512


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--small", action="store_true", help="a larger shape that is not large")
    parser.add_argument("--folder", type=Path, help="where files are written; a temporary one")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    demo = load(asked.bundle, threads=1).new_state(STREAMS, full=True)
    layer = LayerSpec(HEADS, ROW, WINDOW, SINKS, WINDOW, WINDOW + CHUNK)
    layers = (layer,) * (1 if asked.small else LAYERS)
    large = GraphContract(layers, "float16", None, 32_000)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        measured = [
            measure(name, state, asked.rounds, Path(folder) / "state")
            for name, state in (("the bundle", demo), ("a larger shape", large_state(large)))
        ]
    write_result(
        asked.out,
        {
            "benchmark": "decoding.snapshots",
            "environment": environment(),
            "rounds": asked.rounds,
            "forks": FORKS,
            "states": measured,
        },
    )
    return 0


def large_state(contract: GraphContract) -> State:
    """Return a state of full rings that no session steps."""
    capacities = {size: size for size in contract.ring_capacities}
    bound = new_bound(contract, STREAMS, capacities)
    session: Any = None
    graphs = CudaGraphs("nothing is run")
    return OnnxRuntimeState(
        session, contract, bound, "cpu", state_id="0" * 64, is_full=True, graphs=graphs
    )


def measure(name: str, state: State, rounds: int, path: Path) -> dict[str, Any]:
    """Return milliseconds and ratios of one stream's state, a slot among others."""
    state.stand_at(10**6)
    state.fill(np.random.default_rng(0))
    slot = state.rows(1, 2)
    saved = slot.snapshot()
    nbytes = saved.nbytes
    block, other = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    held: list[Any] = [saved, slot.snapshot()]

    def copy() -> None:
        np.copyto(other, block)

    def fresh_copy() -> None:
        held[1] = block.copy()

    def fresh_copies() -> None:
        held[1] = [block.copy() for _ in range(FORKS)]

    def into() -> None:
        held[0] = slot.snapshot(into=held[0])

    def fresh() -> None:
        held[1] = slot.snapshot()

    def fork() -> None:
        held[1] = slot.fork(FORKS)

    def write() -> None:
        with open(path.with_name("plain"), "wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        held[1] = np.fromfile(path.with_name("plain"), np.uint8)

    def load_file() -> None:
        held[1] = Snapshot.load(path, slot.contract, slot.state_id)

    def both() -> None:
        into()
        slot.restore(held[0])

    pairs: dict[str, tuple[Callable[[], None], Callable[[], None], int]] = {
        "snapshot into an old one": (into, copy, 1),
        "restore": (lambda: slot.restore(held[0]), copy, 1),
        "snapshot into an old one, and restore": (both, copy, 2),
        "copy_row": (lambda: state.copy_row(0, 1), copy, 1),
        "snapshot": (fresh, fresh_copy, 1),
        f"fork({FORKS})": (fork, fresh_copies, 1),
        "save": (lambda: held[0].save(path), write, 1),
        "load": (load_file, read, 1),
    }
    return {
        "state": name,
        "bytes": nbytes,
        "file_bytes": _file_bytes(held[0], path),
        "times": {
            title: _compared(work, plain, copies, rounds)
            for title, (work, plain, copies) in pairs.items()
        },
    }


def _file_bytes(snapshot: Snapshot, path: Path) -> int:
    snapshot.save(path)
    return path.stat().st_size


def _compared(
    work: Callable[[], None], plain: Callable[[], None], copies: int, rounds: int
) -> dict[str, float]:
    """Return medians in milliseconds, and the median of the ratios to as many plain copies."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        times.append((_ms(work), _ms(plain) * copies))
    found, wanted = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "ms": round(found, 4),
        "plain_ms": round(wanted, 4),
        "ratio": round(statistics.median(a / b for a, b in times), 3),
    }


def _ms(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    sys.exit(main())
