"""Evaluation against raw chunked prefill, in turns: the cost of scoring a text over reading it.

    python -m benchmarks.evaluation.evaluation_speed demo --text examples/demo-llama/heldout.txt \\
        --out benchmarks/results/evaluation_speed.json

Three ways through the same tokens in one session: with no logits, with the logits of every
token left as they are, and with every token scored as `lminf eval perplexity` does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lminf_export
from benchmarks.support.result import write_result
from lminf_export.evaluate.scorers import BundleScorer
from lminf_export.evaluate.text import read_stream
from lminf_export.runtime.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = lminf_export.load(arguments.bundle, threads=arguments.threads)
    ids = read_stream(
        model.codec, [arguments.text], max_tokens=arguments.tokens + 1, repeat=True
    ).ids
    chunk = model.bundle.manifest.lambda_config.chunk_size
    starts = range(0, arguments.tokens, chunk)

    def prefill(logits: str) -> None:
        state = model.new_state()
        for start in starts:
            model.forward(ids[None, start : start + chunk], state, logits=logits)

    def evaluate() -> None:
        scorer = BundleScorer(model)
        for start in starts:
            stop = min(start + chunk, arguments.tokens)
            scorer.score(ids[start:stop], ids[start + 1 : stop + 1])

    ways: dict[str, Callable[[], None]] = {
        "prefill without logits": lambda: prefill("none"),
        "prefill with all logits": lambda: prefill("all"),
        "evaluation": evaluate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    rates = {name: arguments.tokens / statistics.median(s) for name, s in seconds.items()}
    raw = rates["prefill with all logits"]
    result = {
        "benchmark": "evaluation_speed",
        "model": model.bundle.manifest.source.name,
        "tokens": arguments.tokens,
        "chunk_size": chunk,
        "vocab_size": model.vocab_size,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "spread": {name: float(np.ptp(s) / np.median(s)) for name, s in seconds.items()},
        "prefill_over_evaluation": raw / rates["evaluation"],
        "prefill_without_logits_over_evaluation": rates["prefill without logits"]
        / rates["evaluation"],
        **environment(),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
