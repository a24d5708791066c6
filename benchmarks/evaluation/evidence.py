"""Measure everything docs/evidence.md says, and draw its pictures.

    python -m benchmarks.evaluation.evidence perplexity-llama ablation-llama passkey-llama …
    python -m benchmarks.evaluation.evidence --list

Each stage is one JSON in benchmarks/results/evidence/; most of them are one `lminf` command,
which is printed. Bundles and half-done work are kept in build/evidence, so a stage that was
interrupted goes on when started again. `benchmarks/evaluation/far_attention.py` measures what
the stock models attend to; `scripts/docs/write_all.py` writes the tables.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import lminf_export
from benchmarks.support.demo_models import HELDOUT_FILES
from benchmarks.support.result import write_result
from lminf_export.evaluate.buckets import Bucket, estimate, log_buckets, ratio
from lminf_export.evaluate.perplexity_options import DEFAULT_TARGETS
from lminf_export.evaluate.perplexity_reading import sampled_targets
from lminf_export.evaluate.scorers import BundleScorer
from lminf_export.evaluate.text import read_stream
from lminf_export.evaluate.torch_scorers import TorchModel, recompute
from lminf_export.runtime.environment import environment
from lminf_export.runtime.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
PICTURES = ROOT / "docs" / "evidence"
WORK = ROOT / "build" / "evidence"
MODELS = {
    "llama": ROOT / "examples" / "demo-llama",
    "mpt": ROOT / "examples" / "demo-mpt",
    "no-start": WORK / "llama-no-start",
}
CONTEXT = 256
# 4096 training lengths and the token that follows.
MILLION = 4096 * CONTEXT + 1
ABLATION_TOKENS = 128 * CONTEXT + 1
DEFAULT = {"window_size": CONTEXT, "num_sink_tokens": 16, "distance_limit": CONTEXT}
SINKS = (0, 1, 2, 4, 16, 64)
WINDOWS = (128, 192, 256, 384)
LIMITS = (256, 384, 512, 1024, 4096)
THREADS = "1"
# Streams that begin all over the held-out texts, for the buckets that one stream hardly fills.
STREAMS = 40
STREAM_TOKENS = 8 * CONTEXT + 1
# Its cost per token grows with the text.
STOCK_SECONDS = "600"


def bundle(model: str, name: str = "", **settings: int) -> Path:
    """Export a model unless its bundle exists; W = the training length, N = 16 by default."""
    settings = {"window_size": CONTEXT, "num_sink_tokens": 16, **settings}
    out = WORK / f"{model}{name}"
    if not out.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        lminf_export.export(MODELS[model], out, **settings)
    return out


def texts(model: str) -> list[Path]:
    """Held-out texts: a novel, then three books of the Bible."""
    return [MODELS[model] / HELDOUT_FILES[name] for name in ("austen", "kjv")]


def run(*command: str | Path) -> None:
    """Print a command as a user would type it, and run it."""
    words = [str(part) for part in command]
    shown = " ".join(word.removeprefix(f"{ROOT}/") for word in words)
    print(f"\n$ {shown}", flush=True)
    module = [sys.executable, "-m", "lminf_export.cli.main"]
    subprocess.run([*module, *words[1:]], cwd=ROOT, check=True)


def perplexity(model: str, name: str, tokens: int, **settings: int) -> None:
    """One long text, beside the alternatives; only the stock model's time is limited."""
    options = [word for text in texts(model) for word in ("--text", text)]
    command = [
        "lminf", "eval", "perplexity", bundle(model, **settings), *options, "--repeat",
        "--max-tokens", str(tokens), "--threads", THREADS, "--state", WORK / f"{name}.state",
    ]  # fmt: skip
    run(*command, "--compare", "window,streaming,recompute", "--budget", "86400")
    run(
        *command, "--compare", "window,streaming,stock,recompute", "--budget", STOCK_SECONDS,
        "--out", RESULTS / f"{name}.json", "--plot", PICTURES / f"{name}.png",
    )  # fmt: skip


def losses_of(path: Path, model: str, tokens: int) -> np.ndarray:
    """Nats of each token behind the first training length of the held-out text."""
    loaded = lminf_export.load(path, threads=int(THREADS))
    stream = read_stream(loaded.codec, texts(model), max_tokens=tokens, repeat=True)
    return losses_along(loaded, stream.ids)[2 * CONTEXT :]


def losses_along(loaded: LanguageModel, ids: np.ndarray) -> np.ndarray:
    """Nats of each token of a stream (T,); 0 for the first."""
    scorer = BundleScorer(loaded)
    losses = np.zeros(len(ids), np.float32)
    last = len(ids) - 1
    for start in range(0, last, scorer.chunk_size):
        stop = min(start + scorer.chunk_size, last)
        losses[start + 1 : stop + 1] = scorer.score(ids[start:stop], ids[start + 1 : stop + 1])
    return losses


def against(*found: np.ndarray) -> dict[str, Any]:
    """Pairs (2, n) of nats, ours first, as a bucket of `lminf eval perplexity` has them."""
    ours, others = np.concatenate(found, axis=1)
    return {
        **estimate(others).to_dict(),
        "lambda_on_the_same_targets": float(np.exp(ours.mean(dtype=np.float64))),
        "lambda_over_this": ratio(ours, others),
    }


def starts(model: str) -> None:
    """The first windows of many streams: one stream's first buckets are too small to say much."""
    path = bundle(model)
    loaded = lminf_export.load(path, threads=int(THREADS))
    torch_model = TorchModel(loaded.bundle, None)
    stream = read_stream(loaded.codec, texts(model))
    edges = log_buckets(STREAM_TOKENS, CONTEXT)
    pairs: dict[Bucket, list[np.ndarray]] = {edge: [] for edge in edges if edge.low >= CONTEXT}
    head, places = stream.num_start_tokens, np.linspace(0, 1, STREAMS, endpoint=False)
    for place in places:
        begin = head + round(place * (len(stream.ids) - head - STREAM_TOKENS))
        body = stream.ids[begin : begin + STREAM_TOKENS - head]
        one = replace(stream, ids=np.concatenate([stream.ids[:head], body]))
        ours = losses_along(loaded, one.ids)
        for bucket, found in pairs.items():
            targets = sampled_targets(one, [bucket], DEFAULT_TARGETS // STREAMS, begin)
            recomputed = [
                losses for _, losses in recompute(torch_model, one.ids, head, targets, CONTEXT)
            ]
            found.append(np.stack([ours[targets], np.concatenate(recomputed)]))
        print(f"{model}: stream at {begin}", flush=True)
    manifest = loaded.bundle.manifest
    write_result(
        RESULTS / f"starts-{model}.json",
        {
            "evaluation": "perplexity of many streams",
            "model": manifest.source.name,
            "bundle_sha256": manifest.manifest_sha256,
            "lambda_config": manifest.lambda_config.model_dump(),
            "streams": STREAMS,
            "tokens_of_each": STREAM_TOKENS,
            "buckets": [[bucket.low + 1, bucket.high] for bucket in pairs],
            "methods": {"recompute": {"by_bucket": [against(*pair) for pair in pairs.values()]}},
            **environment(),
        },
    )


def ablation(model: str) -> None:
    """Change one setting at a time; all on the same tokens as the default setting."""
    rows: list[dict[str, Any]] = []
    base = losses_of(bundle(model), model, ABLATION_TOKENS)
    cases = [("num_sink_tokens", value) for value in SINKS]
    cases += [("window_size", value) for value in WINDOWS]
    cases += [("distance_limit", value) for value in LIMITS]
    for field, value in cases:
        losses = base
        if value != DEFAULT[field]:
            path = bundle(model, f"-{field}-{value}", **{field: value})
            losses = losses_of(path, model, ABLATION_TOKENS)
        row = {"setting": field, "value": value, **estimate(losses).to_dict()}
        rows.append({**row, "over_default": ratio(losses, base)})
        print(f"{model} {field}={value}: {row['perplexity']:.2f}", flush=True)
    write_result(
        RESULTS / f"ablation-{model}.json",
        {
            "evaluation": "ablation",
            "model": MODELS[model].name,
            "default": DEFAULT,
            "tokens": ABLATION_TOKENS,
            "from_token": 2 * CONTEXT,
            "rows": rows,
            **environment(),
        },
    )


def passkey(model: str, name: str = "", **settings: int) -> None:
    """Keys in filler, by length and depth."""
    label = f"passkey-{model}{name}"
    run(
        "lminf", "eval", "passkey", bundle(model, name, **settings), "--threads", THREADS,
        "--out", RESULTS / f"{label}.json", "--plot", PICTURES / f"{label}.png",
    )  # fmt: skip


def generation(model: str) -> None:
    """100,000 tokens in one stream.

    A small model that copies falls into loops at lower temperatures, whatever its cache.
    """
    options = [word for text in texts(model) for word in ("--reference", text)]
    run(
        "lminf", "eval", "generate", bundle(model), *options, "--threads", THREADS,
        "--temperature", "1",
        "--out", RESULTS / f"generation-{model}.json",
        "--plot", PICTURES / f"generation-{model}.png",
    )  # fmt: skip


def training() -> None:
    """Keep what the trainings said about themselves."""
    for model, folder in MODELS.items():
        shutil.copy(folder / "training.json", RESULTS / f"training-{model}.json")


STAGES: dict[str, Callable[[], None]] = {
    "training": training,
    "perplexity-llama": lambda: perplexity("llama", "perplexity-llama", MILLION),
    "perplexity-mpt": lambda: perplexity("mpt", "perplexity-mpt", 128 * CONTEXT + 1),
    "starts-llama": lambda: starts("llama"),
    "starts-mpt": lambda: starts("mpt"),
    "ablation-llama": lambda: ablation("llama"),
    "ablation-mpt": lambda: ablation("mpt"),
    "ablation-no-start": lambda: ablation("no-start"),
    "passkey-llama": lambda: passkey("llama"),
    "passkey-llama-wide-sinks": lambda: passkey("llama", "-sinks-96", num_sink_tokens=96),
    "passkey-mpt": lambda: passkey("mpt"),
    "generation-llama": lambda: generation("llama"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help="which to run; all by default")
    parser.add_argument("--list", action="store_true", help="name the stages and do nothing")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stages {unknown}; there are {', '.join(STAGES)}")
    if arguments.list:
        print("\n".join(STAGES))
        return
    for folder in (RESULTS, PICTURES):
        folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.stages or STAGES:
        STAGES[name]()


if __name__ == "__main__":
    main()
