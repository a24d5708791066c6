"""One stream of a million tokens: does a token at the end cost what it cost at the start?

The stream is decoded token by token (greedily from its own logits). From time to time it is
compared with a twin: a second state of the same session, reset to just over one full ring of
tokens, decoding in alternation with the stream, so that both feel the same machine. Reports
the ratio of their times, and the process's resident memory along the way.

    python -m benchmarks.decoding.endurance --bundle demo --out benchmarks/results/endurance.json
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

import lminf_export
from benchmarks.support.result import write_result
from lminf_export import LanguageModel
from lminf_export.runtime.environment import environment

ROUND = 64  # tokens decoded in one go before the other contestant's turn


class Stream:
    """A state that decodes greedily and remembers its last token."""

    def __init__(self, model: LanguageModel, prompt: NDArray[np.int64]) -> None:
        self.model, self.state = model, model.new_state()
        self.model.forward(prompt[None], self.state, logits="none")
        self.token = np.array([[int(prompt[-1])]])

    def decode(self, count: int) -> float:
        """Decode tokens; return seconds per token."""
        start = time.perf_counter()
        for _ in range(count):
            logits = self.model.forward(self.token, self.state, logits="last")
            assert logits is not None
            self.token[0, 0] = int(logits[0, 0].argmax())
        return (time.perf_counter() - start) / count

    @property
    def position(self) -> int:
        return int(self.state.past_length[0])


def full_ring_prompt(model: LanguageModel) -> NDArray[np.int64]:
    """Random tokens, one more than the largest ring holds: everything has wrapped once."""
    capacity = max(layer.ring_capacity for layer in model.bundle.manifest.layers)
    return np.random.default_rng(0).integers(0, model.vocab_size, capacity + 1)


def compare(stream: Stream, model: LanguageModel, rounds: int) -> dict[str, Any]:
    """Alternate stream and a fresh twin; return medians and the ratio of each pair."""
    twin = Stream(model, full_ring_prompt(model))
    twin.decode(ROUND)
    pairs = []
    for index in range(rounds):
        # Who goes first alternates too.
        first, second = (stream, twin) if index % 2 else (twin, stream)
        times = {id(first): first.decode(ROUND), id(second): second.decode(ROUND)}
        pairs.append((times[id(stream)], times[id(twin)]))
    own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "position": stream.position,
        "stream_ms_per_token": round(own * 1e3, 4),
        "twin_ms_per_token": round(other * 1e3, 4),
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "pairs": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--checks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = lminf_export.load(arguments.bundle, threads=arguments.threads)
    stream = Stream(model, full_ring_prompt(model))
    compare(stream, model, arguments.rounds)  # warms up the session and the allocator
    process, rows, start = psutil.Process(), [], time.perf_counter()
    for check in range(1, arguments.checks + 1):
        stream.decode(max(1, arguments.tokens * check // arguments.checks - stream.position))
        row = compare(stream, model, arguments.rounds)
        gc.collect()
        row["rss_bytes"] = process.memory_info().rss
        row["cache_bytes"] = stream.state.nbytes
        rows.append(row)
        print(row, file=sys.stderr)
    rss = [row["rss_bytes"] for row in rows]
    manifest = model.bundle.manifest
    result = {
        "benchmark": "endurance",
        "model": manifest.source.name,
        "dtype": manifest.dtype,
        "lambda_config": manifest.lambda_config.model_dump(),
        "threads": arguments.threads,
        "tokens": stream.position,
        "seconds": round(time.perf_counter() - start, 1),
        "checks": rows,
        "ratio_at_the_end": rows[-1]["ratio"],
        "rss_growth": round(max(rss) / min(rss) - 1, 5),
        "cache_bytes": stream.state.nbytes,
        **environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
