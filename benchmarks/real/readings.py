"""The long readings: which methods and settings read which text, and what is written of them.

One JSON holds a row for each; a row that is there with the same settings is not read again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lminf_export
from benchmarks.real import scoring, texts
from benchmarks.real.checkpoint import RealModel
from lminf_export.evaluate.buckets import BLOCK_TOKENS, RESAMPLES
from lminf_export.evaluate.text import read_stream
from lminf_export.evaluate.torch_scorers import TorchModel
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.runtime.environment import environment
from lminf_export.verify.likelihood import negative_log_likelihood

LONG = 131_072
SHORT = 16_384
FIRST = 8192
BUCKET = 1024
DEFAULT = {"window_size": 1024, "num_sink_tokens": 16}
assert scoring.CHUNK // scoring.EVERY == BLOCK_TOKENS  # a number is a block of the bootstrap


@dataclass(frozen=True)
class Reading:
    """One row.

    Attributes:
        name: unique.
        text: name in `texts.SOURCES`.
        tokens: how many are read.
        settings: of the export.
        method: "export", "streaming", "recompute" or "transformers".
    """

    name: str
    text: str = "austen"
    tokens: int = LONG
    settings: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT))
    method: str = "export"


def _set(**changed: Any) -> dict[str, Any]:
    return {**DEFAULT, **changed}


STOCK = {"window_size": LONG, "num_sink_tokens": 0}
PERPLEXITY = [
    Reading("lambda"),
    Reading("window", settings=_set(num_sink_tokens=0)),
    Reading("stock", settings=STOCK),
    Reading("streaming", method="streaming"),
    Reading("transformers", tokens=4096, settings=STOCK, method="transformers"),
    Reading("lambda-int8-ring", settings=_set(kv_cache_dtype="int8")),
    Reading("lambda-int8", settings=_set(quantize="int8", source_blocks="requantize")),
    Reading("lambda-4096", settings=_set(window_size=4096)),
    Reading("window-4096", settings=_set(window_size=4096, num_sink_tokens=0)),
    Reading("recompute", method="recompute"),
    Reading("streaming-4096", settings=_set(window_size=4096), method="streaming"),
    Reading("lambda-int4", settings=_set(quantize="int4", source_blocks="requantize")),
    Reading("lambda-kept-blocks", settings=_set(quantize="int4")),
    Reading("whale-lambda", "whale"),
    Reading("whale-window", "whale", settings=_set(num_sink_tokens=0)),
    Reading("whale-stock", "whale", settings=STOCK),
    Reading("recompute-4096", settings=_set(window_size=4096), method="recompute"),
]
ABLATION = [
    *(Reading(f"N={n}", tokens=SHORT, settings=_set(num_sink_tokens=n)) for n in (1, 4, 64)),
    *(
        Reading(f"L={n}", tokens=SHORT, settings=_set(distance_limit=n))
        for n in (2048, 8192, 32768)
    ),
    Reading("all-layers", tokens=SHORT, settings=_set(lambda_layers="all")),
    *(Reading(f"W={n}", tokens=SHORT, settings=_set(window_size=n)) for n in (512, 2048, 256)),
]


class Readings:
    """The rows of a file, and the making of those that it lacks.

    Args:
        model: what is read with.
        work: folder of bundles, texts and half-done readings.
        out: the JSON.
    """

    def __init__(self, model: RealModel, work: Path, out: Path) -> None:
        self.model, self.work, self.out = model, work, out
        self.result: dict[str, Any] = {"rows": {}}
        if out.is_file():
            self.result = json.loads(out.read_text(encoding="utf-8"))

    def make_all(self, wanted: list[Reading], threads: int, tokens: int = LONG) -> None:
        """Read what is not in the file yet: all rows to the same length, then twice as far.

        So rows can be compared whenever a run is cut off, at the latest behind so many tokens.
        """
        limit = FIRST
        while limit <= tokens:
            for reading in wanted:
                if reading.method == "recompute" and limit < LONG:
                    continue
                if reading.tokens >= limit or limit == FIRST:
                    self.make(replace(reading, tokens=min(reading.tokens, limit)), threads)
            limit *= 2

    def make(self, reading: Reading, threads: int) -> None:
        """Read a row as far as it says, unless the file has it as far, and write it."""
        wanted = asdict(reading)
        tokens = wanted.pop("tokens")
        found = self.result["rows"].get(reading.name)
        same = found and all(found[key] == value for key, value in wanted.items())
        if same and found["tokens"] >= tokens:
            return
        print(f"{reading.name}: to {tokens} tokens", file=sys.stderr, flush=True)
        row = self._read(reading, threads)
        self.result["rows"][reading.name] = {**wanted, **row, **environment()}
        self.write()
        print(f"{reading.name}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)

    def _read(self, reading: Reading, threads: int) -> dict[str, Any]:
        loaded = lminf_export.load(self.bundle(reading.settings), threads=threads)
        file = texts.path_of(reading.text, self.work)
        stream = read_stream(loaded.codec, [file], max_tokens=LONG + 1)
        ids = stream.ids
        manifest = loaded.bundle.manifest
        told = {
            "source": manifest.source.name,
            "bundle_sha256": manifest.manifest_sha256,
            "lambda_config": manifest.lambda_config.model_dump(),
            "training_length": manifest.training_length,
            "attention": loaded.session.attention if reading.method == "export" else "torch",
            "threads": threads,
        }
        scored = [scoring.EVERY, scoring.DENSE, scoring.SPARSE]
        identity = [reading.name, reading.method, told["bundle_sha256"], stream.sha256, *scored]
        if reading.method == "recompute":
            return {**told, **recompute(loaded, ids, reading)}
        reader = self._reader(reading, loaded, threads)
        kept = self.work / f"{reading.name}.npz"
        run = scoring.read_stream(reader, ids, reading.tokens, kept, identity)
        return {
            **told,
            **run,
            "nats": _packed(run["nats"]),
            "nats_of_single": _packed(run["nats_of_single"]),
        }

    def _reader(self, reading: Reading, loaded: Any, threads: int) -> scoring.Reader:
        if reading.method == "export":
            return scoring.BundleReader(loaded)
        import torch

        torch.set_num_threads(threads)
        if reading.method == "transformers":
            return scoring.TransformersReader(self.model.path)
        return scoring.StreamingReader(TorchModel(loaded.bundle))

    def bundle(self, settings: dict[str, Any]) -> Path:
        """Return the bundle of some settings, exported unless it is there."""
        name = "-".join(f"{key}={value}" for key, value in settings.items())
        out = self.work / "bundles" / name
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            options = dict(settings)
            if "source_blocks" in settings:
                weights, blocks = options.pop("quantize"), options.pop("source_blocks")
                options["quantize"] = QuantizeConfig(weights, source_blocks=blocks)
            lminf_export.export(self.model.path, out, **options)
        return out

    def write(self) -> None:
        """Write the file with what follows from its rows."""
        rows = self.result["rows"]
        result = {
            "evaluation": "long readings of a real model",
            "model": self.model.described(),
            "texts": {
                name: texts.described(name, self.work)
                for name in sorted({r["text"] for r in rows.values()})
            },
            "every": {"up_to": scoring.DENSE, "scored": scoring.EVERY, "beyond": scoring.SPARSE},
            "tokens_of_a_number": scoring.CHUNK,
            "rows": rows,
            "summary": {name: summary(row, rows) for name, row in rows.items()},
        }
        self.result = result
        self.out.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.out.with_suffix(".new")
        fresh.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(self.out)


def recompute(loaded: Any, ids: NDArray[np.int64], reading: Reading) -> dict[str, Any]:
    """Score every SINGLE-th token from the last W tokens, read afresh behind the start token.

    Up to W tokens an export is the unmodified model, so that this is that model's best.
    """
    window = loaded.bundle.manifest.lambda_config.window_size
    found, seconds = [], 0.0
    for target in range(scoring.SINGLE, reading.tokens + 1, scoring.SINGLE):
        kept = (
            ids[:target]
            if target <= window
            else np.append(ids[:1], ids[target - window + 1 : target])
        )
        begun = time.perf_counter()
        logits = loaded.forward(kept[None], loaded.new_state(), logits="last")
        found.append(float(negative_log_likelihood(logits[0], ids[[target]])[0]))
        seconds += time.perf_counter() - begun
    return {
        "nats_of_single": _packed(found),
        "tokens": reading.tokens,
        "seconds": round(seconds, 1),
    }


def buckets(tokens: int) -> list[tuple[int, int]]:
    """Return [low, high) in tokens before the scored one, doubling from BUCKET on."""
    edges = [0, BUCKET]
    while edges[-1] < tokens:
        edges.append(min(2 * edges[-1], tokens))
    return list(pairwise(edges))


def summary(row: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Perplexity by bucket, behind twice the default window, and to the ablations' length.

    "within" ends at the training length, "past" begins there. Each beside that of the default
    settings on the same tokens, as their ratio.
    """
    base = rows.get("whale-lambda" if row["text"] == "whale" else "lambda")
    if "nats" not in row:
        return {"single": compared(row, base, "nats_of_single", scoring.SINGLE, 0, row["tokens"])}
    end, start = row["tokens"], 2 * BUCKET
    trained = row["training_length"]
    spans = {
        "beyond": (start, end),
        "short": (start, min(end, SHORT)),
        "within": (start, min(end, trained)),
        "past": (trained, end),
    }
    beside = partial(compared, row, base, "nats", scoring.CHUNK)
    return {
        "by_bucket": [_span(low, high, beside) for low, high in buckets(end)],
        **{name: _span(*span, beside) for name, span in spans.items() if span[1] > span[0]},
    }


def _span(low: int, high: int, beside: Callable[[int, int], dict[str, Any]]) -> dict[str, Any]:
    return {"from": low + 1, "to": high, **beside(low, high)}


def compared(
    row: dict[str, Any], base: dict[str, Any] | None, key: str, unit: int, low: int, high: int
) -> dict[str, Any]:
    """Perplexity of a span with its interval, and its ratio to another row's."""
    span = slice(low // unit, -(-high // unit))
    values = unpacked_numbers(row[key])[span]
    found: dict[str, Any] = _estimate(values)
    if base is not None and key in base:
        others = unpacked_numbers(base[key])[span]
        if len(others) >= len(values) and base is not row:
            found["over"] = _estimate(values - others[: len(values)])
    return found


def _estimate(values: NDArray[np.float64]) -> dict[str, float]:
    """Exp of a mean of numbers of equal weight, with its 95 % bootstrap interval."""
    dice = np.random.default_rng(0)
    means = values[dice.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "value": round(float(np.exp(values.mean())), 5),
        "low": round(float(np.exp(low)), 5),
        "high": round(float(np.exp(high)), 5),
        "numbers": len(values),
    }


def _packed(values: list[float]) -> str:
    """A row of numbers as one string, which keeps the JSON readable."""
    return " ".join(f"{value:.5f}" for value in values)


def unpacked_numbers(text: str) -> NDArray[np.float64]:
    """Return the numbers of such a string."""
    return np.array(text.split(), np.float64)
