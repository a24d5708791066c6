"""Perplexity against context length: the stock model and its Λ export on the same tokens.

Blocks of target tokens are drawn from a held-out text. For each length n every block is scored
with the n tokens that end in it as context, behind a start token, so all lengths predict the
same tokens and differ in the context alone. The stock model runs in torch with its full cache,
the export in onnxruntime, in chunks.

    python -m benchmarks.evaluation.perplexity --bundle demo --model examples/demo-llama \\
        --text examples/demo-llama/heldout.txt --out benchmarks/results/perplexity.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lminf_export
from benchmarks.support.result import write_result
from lminf_export.runtime.environment import environment
from lminf_export.verify.likelihood import negative_log_likelihood

TARGETS = 64  # tokens scored at the end of each context
Score = Callable[[NDArray[np.int64]], NDArray[np.float64]]


def bundle_scorer(bundle: str) -> Score:
    """Score by the exported graph; only the targets' logits are computed."""
    model = lminf_export.load(bundle)

    def score(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        state = model.new_state()
        split = len(tokens) - TARGETS - 1
        if split:
            model.forward(tokens[None, :split], state, logits="none")
        logits = model.forward(tokens[None, split:-1], state)
        assert logits is not None
        return negative_log_likelihood(logits[0], tokens[-TARGETS:], np.float64)

    return score


def stock_scorer(model: str) -> Score:
    """Score by the unmodified model in torch, its full attention over everything."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        ids = torch.from_numpy(tokens[None, :-1])
        logits = stock(ids, use_cache=False, logits_to_keep=TARGETS).logits[0]
        return negative_log_likelihood(logits.numpy(), tokens[-TARGETS:], np.float64)

    return score


def blocks_of(
    tokens: NDArray[np.int64], longest: int, count: int, seed: int
) -> list[NDArray[np.int64]]:
    """Draw spans of `longest` tokens whose last TARGETS tokens do not overlap."""
    ends = np.arange(longest, len(tokens) + 1, TARGETS)
    if len(ends) < count:
        raise SystemExit(
            f"the text has {len(tokens)} tokens: room for {len(ends)} blocks behind {longest} "
            f"tokens of context, {count} asked for"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(ends, count, replace=False))
    return [tokens[end - longest : end] for end in chosen]


def measure(score: Score, spans: list[NDArray[np.int64]], length: int, bos: int) -> dict[str, Any]:
    """Perplexity over all blocks at one context length, with a bootstrap interval."""
    losses = np.stack([score(np.concatenate(([bos], span[-length:]))) for span in spans])
    rng = np.random.default_rng(0)
    resampled = losses.mean(1)[rng.integers(0, len(spans), (2000, len(spans)))].mean(1)
    low, high = np.exp(np.quantile(resampled, (0.025, 0.975)))
    return {
        "context_tokens": length,
        "perplexity": float(np.exp(losses.mean())),
        "interval_95": [float(low), float(high)],
        "targets": int(losses.size),
    }


def print_table(result: dict[str, Any]) -> None:
    """One line a model, one column a length."""
    length = result["training_length"]
    names = [f"{r['context_tokens'] / length:g}×" for r in result["series"]["lambda"]]
    print("perplexity, context of".ljust(34) + "".join(name.rjust(10) for name in names))
    labels = {"stock": "stock model, full attention", "lambda": "Λ export, bounded cache"}
    for key, rows in result["series"].items():
        values = {r["context_tokens"]: r["perplexity"] for r in rows}
        cells = (values.get(r["context_tokens"]) for r in result["series"]["lambda"])
        text = "".join((f"{v:.2f}" if v is not None else "–").rjust(10) for v in cells)
        print(labels[key].ljust(34) + text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=[0.5, 1, 2, 4, 8, 16, 32, 64],
        help="context lengths as multiples of the training length",
    )
    parser.add_argument("--stock-limit", type=float, default=32, help="longest for the stock model")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="print a table instead of JSON")
    arguments = parser.parse_args()
    model = lminf_export.load(arguments.bundle)
    manifest = model.bundle.manifest
    training, bos = manifest.training_length, manifest.bos_token_id
    assert training is not None
    assert bos is not None
    tokens = np.asarray(model.codec.encode(arguments.text.read_text(encoding="utf-8")), np.int64)
    tokens = tokens[tokens != bos]
    # A start token stands before the context and counts as one of its tokens.
    lengths = [int(factor * training) - 1 for factor in sorted(arguments.factors)]
    spans = blocks_of(tokens, lengths[-1], arguments.blocks, arguments.seed)
    series: dict[str, list[dict[str, Any]]] = {"stock": [], "lambda": []}
    scorers = {"stock": stock_scorer(arguments.model), "lambda": bundle_scorer(arguments.bundle)}
    for length in lengths:
        for name, score in scorers.items():
            if name == "stock" and length + 1 > arguments.stock_limit * training:
                continue
            row = measure(score, spans, length, bos)
            row["context_tokens"] = length + 1
            series[name].append(row)
            print(f"{name} {length + 1}: {row['perplexity']:.3f}", file=sys.stderr)
    result = {
        "benchmark": "perplexity",
        "model": manifest.source.name,
        "training_length": training,
        "lambda_config": manifest.lambda_config.model_dump(),
        "dtype": manifest.dtype,
        "text": arguments.text.name,
        "text_tokens": len(tokens),
        "seed": arguments.seed,
        "series": series,
        **environment(),
    }
    if arguments.table:
        print_table(result)
        if arguments.out is None:
            return
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
