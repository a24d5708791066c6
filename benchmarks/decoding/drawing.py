"""Time to draw a token: every kind of sampling, by the kernel library and by numpy.

Random logits, flat ones and such that few tokens stand out; after each draw another array is read,
as a step of a model would, so that logits come from where a step leaves them. The check that
logits are finite, which every step makes, is measured beside it.

    python -m benchmarks.decoding.drawing --out benchmarks/results/drawing.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.result import write_result
from lminf_export.runtime.drawing import Drawing, drawing_of
from lminf_export.runtime.environment import environment
from lminf_export.runtime.kernels import AUTO, INSTALLED, find_kernels, open_library
from lminf_export.runtime.sampling import Sampler, SamplingConfig

VOCABULARIES = (32_000, 128_256, 262_144)
BATCHES = (1, 4)
# The standard deviation of the logits: flat ones, and such that few tokens stand out.
SPREADS = (1.0, 4.0)
MEMORY = 1024
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, penalty": {"repetition_penalty": 1.1},
    "greedy, written tokens and biases": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": dict.fromkeys(range(0, 900, 3), 1.0),
    },
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 40},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "top-k, top-p, penalty": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
    },
    "top-p, min-p, penalty": {
        "temperature": 0.8,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
    },
    "top-p, all penalties and biases": {
        "temperature": 0.8,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": dict.fromkeys(range(0, 900, 3), 1.0),
    },
}


def measured(
    vocab_size: int, spread: float, kind: str, batch_size: int, drawing: Drawing | None, rounds: int
) -> dict[str, Any]:
    """Milliseconds a token, of `rounds` steps of some streams."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(batch_size, vocab_size)) * spread).astype(np.float32)
    config = SamplingConfig(**KINDS[kind], seed=0)
    samplers = [Sampler(config, vocab_size, MEMORY, drawing) for _ in range(batch_size)]
    for sampler in samplers:
        sampler.observe(rng.integers(0, vocab_size, MEMORY).tolist())
    times = []
    for _ in range(rounds):
        np.add(logits, 0, out=logits)  # written anew, as by a step
        for sampler, row in zip(samplers, logits, strict=True):
            start = time.perf_counter()
            sampler.observe((sampler.choose(row),))
            times.append((time.perf_counter() - start) * 1e3)
    return {"median": round(statistics.median(times), 4), "best": round(min(times), 4)}


def check_ms(vocab_size: int, rounds: int) -> float:
    """Milliseconds of the check that one stream's logits are finite."""
    logits = np.zeros(vocab_size, np.float32)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        np.isfinite(logits.sum())
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ways = {"numpy": None, "library": drawing_of(find_kernels(AUTO, "cpu"))}
    if ways["library"] is None:
        raise SystemExit(f"{INSTALLED} is missing or of an older build: pip install . builds it")
    rows = []
    for vocab_size in arguments.vocabularies:
        for spread in SPREADS:
            for kind in KINDS:
                row: dict[str, Any] = {
                    "vocab_size": vocab_size,
                    "logits_standard_deviation": spread,
                    "kind": kind,
                }
                for name, drawing in ways.items():
                    few = arguments.rounds if drawing else max(arguments.rounds // 10, 1)
                    row[name] = {
                        str(batch): measured(vocab_size, spread, kind, batch, drawing, few)
                        for batch in BATCHES
                    }
                print(row, file=sys.stderr)
                rows.append(row)
    result = {
        "benchmark": "drawing",
        "rounds": arguments.rounds,
        "threads": 1,
        "library": open_library(INSTALLED).description,
        "memory_of_the_penalty": MEMORY,
        "ms_a_token_by_batch_size": rows,
        "check_ms": {str(v): check_ms(v, arguments.rounds) for v in arguments.vocabularies},
        **environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
