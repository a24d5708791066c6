"""Two ways to ask for weights ahead: as data used once, and like any other data.

The kernel library chooses by the processor (plugins/onnxruntime/cpu/ask.h); here each bundle
decodes both ways in turn, in one process, with the same memory. Decoding positions are set, not
read: rings hold random numbers.

    python -m benchmarks.kernels.asking --bundle float32 A --bundle int4 B \
        --out benchmarks/results/asking.json
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from pathlib import Path
from typing import Any

import lminf_export
from benchmarks.support.result import write_result
from benchmarks.support.stream import Stream
from lminf_export.bench.floor import streaming_bandwidth, weight_bytes_per_step
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.kernels import INSTALLED
from lminf_export.runtime.language_model import LanguageModel

WAYS = {"once": 1, "kept": 0}
POSITION = 512
STEPS = 5  # tokens decoded in one go before the other's turn


def decoded(model: LanguageModel, library: ctypes.CDLL, rounds: int) -> dict[str, Any]:
    """Decode both ways in turn."""
    stream = Stream(model)
    stream.stand_at(POSITION)
    turns: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds):
        for way in sorted(WAYS, reverse=turn % 2 == 1):
            library.lminfAskForOnce(WAYS[way])
            stream.decode(1)
            turns[way].append(stream.decode(STEPS) * 1e3)
    ratios = [once / kept for once, kept in zip(turns["once"], turns["kept"], strict=True)]
    return {
        "ms_per_token": {way: round(statistics.median(times), 3) for way, times in turns.items()},
        "once_over_kept": {
            "median": round(statistics.median(ratios), 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(ratios)[::2]],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bundle", action="append", nargs=2, metavar=("WEIGHTS", "DIR"), required=True
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    library = ctypes.CDLL(str(INSTALLED))
    chosen = "once" if library.lminfAsksForOnce() else "kept"
    rows = []
    for weights, folder in arguments.bundle:
        for threads in arguments.threads:
            model = lminf_export.load(folder, kernels=str(INSTALLED), threads=threads)
            found = decoded(model, library, arguments.rounds)
            row = {
                **describe_bundle(model.bundle.manifest),
                "weights": weights,
                "weight_bytes_per_step": weight_bytes_per_step(model.bundle, 1),
                "threads": threads,
                **found,
            }
            print(row, file=sys.stderr)
            rows.append(row)
    library.lminfAskForOnce(WAYS[chosen])
    result = {
        "benchmark": "asking",
        "chosen_here": chosen,
        "position": POSITION,
        "rounds": arguments.rounds,
        "bandwidth_bytes_per_second": {
            str(threads): streaming_bandwidth(threads) for threads in arguments.threads
        },
        "rows": rows,
        **environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
