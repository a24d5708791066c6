"""Int8 caches: their cost in perplexity, and the bytes and time they save.

`perplexity` scores each demo model on its held-out texts, in onnxruntime, as one stream in chunks,
with its caches in float32 and in int8, on the same tokens. `decode` times single tokens of a
Llama-shaped model of random weights with both, taking turns.

    python -m benchmarks.decoding.kv_cache perplexity \\
        --out benchmarks/results/kv_cache-perplexity.json
    python -m benchmarks.decoding.kv_cache decode --work DIR \\
        --out benchmarks/results/kv_cache-decode.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lminf_export
from benchmarks.support.checkpoints import SHAPES, write_checkpoint
from benchmarks.support.result import write_result
from lminf_export.bench.floor import cache_bytes_per_step, streaming_bandwidth
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.verify.perplexity_cost import perplexity_cost

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CACHES = {"float32": "auto", "int8": "int8"}
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("perplexity", "decode"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path)
        command.add_argument("--threads", type=int, default=1)
        if name == "perplexity":
            command.add_argument("--tokens", type=int, default=32768)
        else:
            command.add_argument("--work", type=Path, required=True, help="keeps the models")
            command.add_argument("--shape", choices=SHAPES, default="100m")
            command.add_argument("--window-size", type=int, default=2048)
            command.add_argument("--positions", type=int, nargs="+", default=[2048, 1_000_000])
            command.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
            command.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    measure = perplexity if arguments.command == "perplexity" else decode
    result = {"benchmark": f"kv_cache {arguments.command}", **measure(arguments), **environment()}
    write_result(arguments.out, result)


def perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for model in sorted(path.parent for path in EXAMPLES.glob("*/model.safetensors")):
        for text in sorted(model.glob("heldout*.txt")):
            with tempfile.TemporaryDirectory(prefix="lminf-") as work:
                rows.append(cost_of(model, text, Path(work), arguments))
            print(rows[-1], file=sys.stderr)
    return {"threads": arguments.threads, "rows": rows}


def cost_of(model: Path, text: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what an int8 cache costs a model on a text, with its training length as window."""
    logits, sizes = {}, {}
    for name, kv_cache_dtype in CACHES.items():
        bundle = lminf_export.export(model, work / name, kv_cache_dtype=kv_cache_dtype)
        loaded = lminf_export.load(bundle.path, threads=arguments.threads)
        ids = loaded.codec.encode(text.read_text(encoding="utf-8"))[: arguments.tokens]
        tokens = np.asarray(ids, np.int64)
        logits[name] = scored(loaded, tokens)
        sizes[name] = bundle.manifest.cache_bytes_per_sequence
    cost = perplexity_cost(logits["float32"], logits["int8"], tokens)
    weights = bundle.manifest.files_of("weights")
    return {
        "model": model.name,
        "weights_sha256": [bundle.manifest.files[name].sha256 for name in weights],
        "text": text.name,
        "tokens": cost.tokens,
        "lambda_config": bundle.manifest.lambda_config.model_dump(),
        "attention": loaded.session.attention,
        "cache_bytes": sizes,
        "cache_bytes_ratio": sizes["int8"] / sizes["float32"],
        "perplexity": {"float32": cost.unquantized, "int8": cost.quantized},
        "cost": cost.cost,
        "standard_error": cost.standard_error,
    }


def scored(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) of one stream."""
    logits = model.forward(tokens[None], model.new_state())
    assert logits is not None
    return logits[0]


class Stream:
    """One bundle's state that stands at a position with full rings of random numbers."""

    def __init__(self, bundle: Bundle, threads: int, batch_size: int, position: int) -> None:
        self.model, self.position = lminf_export.load(bundle.path, threads=threads), position
        self.state = self.model.new_state(batch_size)
        self.token = np.zeros((batch_size, 1), np.int64)
        self.model.session.stand_at(self.state, position)
        self.model.session.fill(self.state, np.random.default_rng(1))

    def decode(self, count: int) -> float:
        """Milliseconds of a step, the mean of a few."""
        self.model.session.stand_at(self.state, self.position)
        start = time.perf_counter()
        for _ in range(count):
            self.model.forward(self.token, self.state, logits="last")
        return (time.perf_counter() - start) * 1e3 / count


def bundles_of(arguments: argparse.Namespace) -> dict[str, Bundle]:
    model = arguments.work / arguments.shape
    if not (model / "config.json").is_file():
        write_checkpoint(model, SHAPES[arguments.shape], torch.float32, 2 * arguments.window_size)
    bundles = {}
    for name, kv_cache_dtype in CACHES.items():
        out = arguments.work / f"{arguments.shape}-{arguments.window_size}-{name}"
        if not out.is_dir():
            lminf_export.export(
                model,
                out,
                window_size=arguments.window_size,
                kv_cache_dtype=kv_cache_dtype,
                weights="link",
            )
        bundles[name] = Bundle.open(out)
    return bundles


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    bundles = bundles_of(arguments)
    rows = []
    for batch_size in arguments.batch_sizes:
        for position in arguments.positions:
            rows.append(race(bundles, batch_size, position, arguments))
            print(rows[-1], file=sys.stderr)
    manifests = {name: bundle.manifest for name, bundle in bundles.items()}
    sizes = {name: manifest.cache_bytes_per_sequence for name, manifest in manifests.items()}
    manifest = manifests["int8"]
    return {
        "shape": arguments.shape,
        "lambda_config": manifest.lambda_config.model_dump(),
        "weights_bytes": sum(manifest.files[x].bytes for x in manifest.files_of("weights")),
        "threads": arguments.threads,
        "bandwidth_bytes_per_second": streaming_bandwidth(arguments.threads),
        "cache_bytes_per_sequence": sizes,
        "cache_bytes_ratio": sizes["int8"] / sizes["float32"],
        "rows": rows,
    }


def race(
    bundles: dict[str, Bundle], batch_size: int, position: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of a step at one position, taking turns, and the ratio of each round."""
    streams = {
        name: Stream(bundle, arguments.threads, batch_size, position)
        for name, bundle in bundles.items()
    }
    times: dict[str, list[float]] = {name: [] for name in streams}
    for stream in streams.values():
        stream.decode(2)
    for _ in range(arguments.rounds):
        for name, stream in streams.items():
            times[name].append(stream.decode(STEPS))
    ratios = [a / b for a, b in zip(times["int8"], times["float32"], strict=True)]
    return {
        "batch_size": batch_size,
        "position": position,
        "rounds": arguments.rounds,
        "attention": {n: s.model.session.attention for n, s in streams.items()},
        "live_cache_bytes": {
            name: batch_size * cache_bytes_per_step(bundle, position)
            for name, bundle in bundles.items()
        },
        "state_bytes": {n: s.state.nbytes for n, s in streams.items()},
        "ms_per_step": {n: round(statistics.median(x), 3) for n, x in times.items()},
        "int8_over_float32": round(statistics.median(ratios), 3),
        "spread_of_ratio": [round(min(ratios), 3), round(max(ratios), 3)],
    }


if __name__ == "__main__":
    main()
