"""The cost of implicit state: the graph with a carried state beside the runtime, in onnxruntime.

    python -m benchmarks.scaling.implicit_state --bundle BUNDLE \\
        --out benchmarks/results/implicit_state.json

`carried`: a step of one token for each row of a batch, with the kernels, where every output of the
state is a new array that is the next step's input, as Triton's implicit state has it: nothing is
updated in place. `runtime`: the same steps by the bundle's session, whose caches are updated in
place. Both by turns, states full. `idle_row_bytes`: the state that Triton holds, and hands to the
graph, for a row without a sequence.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import lminf_export
from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.bundle.folder import Bundle
from lminf_export.operator.bindings import BATCH
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.kernels import AUTO, find_kernels
from lminf_export.triton.implicit_state import (
    PRESENT_LENGTH,
    READY,
    START,
    STATE_LENGTH,
    write_implicit_state,
)


class Carried:
    """A session over the graph with implicit state, whose outputs are its next inputs.

    Args:
        bundle: whose graph it is.
        folder: that the graph is written to.
        rows: of the batch.
        threads: of operators.
    """

    def __init__(self, bundle: Bundle, folder: Path, rows: int, threads: int) -> None:
        write_implicit_state(bundle, folder / "model.onnx")
        for name in bundle.manifest.files_of("weights"):
            (folder / name).symlink_to((bundle.path / name).resolve())
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        kernels = find_kernels(AUTO, "cpu", bundle.manifest.kv_cache_dtype)
        if kernels is not None:
            options.register_custom_ops_library(str(kernels.path))
        # Weights beside the graph are links.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path",
                                         str(bundle.path.resolve()))  # fmt: skip
        self._session = ort.InferenceSession(str(folder / "model.onnx"), options)
        contract = bundle.manifest.contract
        sizes = {**contract.ring_sizes(), BATCH: rows}
        window = contract.ring_capacities[-1]
        self._state: dict[str, Any] = {STATE_LENGTH: np.full((rows, 1), 2 * window)}
        self._next = {PRESENT_LENGTH: STATE_LENGTH}
        pairs = zip(contract.caches(present=False), contract.caches(present=True), strict=True)
        for past, present in pairs:
            self._state[past.name] = np.zeros(past.sized(sizes), past.dtype)
            self._next[present.name] = past.name
        self._names = [output.name for output in self._session.get_outputs()]
        self._ones = np.ones((rows, 1), bool)

    def step(self, ids: np.ndarray) -> None:
        """Read a token of each row."""
        given = {"input_ids": ids, START: ~self._ones, READY: self._ones, **self._state}
        found = dict(zip(self._names, self._session.run(self._names, given), strict=True))
        self._state = {before: found[after] for after, before in self._next.items()}


def measure(bundle: Path, rows: int, threads: int, steps: int, rounds: int) -> dict[str, Any]:
    """Time steps of a batch both ways."""
    lm = lminf_export.load(bundle, threads=threads)
    contract = lm.bundle.manifest.contract
    state = lm.session.new_state(rows, full=True)
    ones, first = np.ones(rows, np.int64), np.zeros((rows, 1), np.int64)
    ids = np.full((rows, 1), 5, np.int64)
    times: dict[str, list[float]] = {"carried": [], "runtime": []}
    with tempfile.TemporaryDirectory() as folder:
        carried = Carried(lm.bundle, Path(folder), rows, threads)
        for _ in range(rounds):
            begun = time.perf_counter()
            for _ in range(steps):
                carried.step(ids)
            times["carried"].append((time.perf_counter() - begun) / steps * 1e3)
            begun = time.perf_counter()
            for _ in range(steps):
                lm.session.step(state, ids, ones, first)
                state.advance(ones)
            times["runtime"].append((time.perf_counter() - begun) / steps * 1e3)
    ratios = [c / r for c, r in zip(times["carried"], times["runtime"], strict=True)]
    return {
        "rows": rows,
        "threads": threads,
        "steps": steps,
        "rounds": rounds,
        "step_ms": {name: round(statistics.median(each), 3) for name, each in times.items()},
        "carried_over_runtime": round(statistics.median(ratios), 2),
        "idle_row_bytes": contract.cache_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--name", help="of the result; the bundle's folder by default")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "implicit_state", "models": {}}
    if arguments.out is not None and arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    name = arguments.name or arguments.bundle.resolve().name
    numbers = (arguments.threads, arguments.steps, arguments.rounds)
    result["models"][name] = {
        **describe_bundle(Bundle.open(arguments.bundle).manifest),
        "batches": [measure(arguments.bundle, rows, *numbers) for rows in arguments.rows],
        "environment": environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    run_script(main)
