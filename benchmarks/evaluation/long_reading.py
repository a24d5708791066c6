"""Ten million tokens in one stream: does the last million read as the second one did?

A bundle reads its held-out texts again and again, as one stream, in chunks with the logits of every
token. Behind the first reading nothing of it is left in the caches, so that each reading has to
give every token the likelihood that the second one gave it, up to rounding: for each reading
its perplexity is written and the largest difference, for each mark the time and the memory.
`--state` keeps what is done; the same command goes on from it, also with more `--tokens`.

    python -m benchmarks.evaluation.long_reading --bundle DIR --text FILE … --state FILE \\
        --out benchmarks/results/evidence/long-reading-llama.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

import lminf_export
from benchmarks.support.result import write_result
from lminf_export.evaluate.scorers import BundleScorer
from lminf_export.evaluate.text import TokenStream, read_stream
from lminf_export.runtime.environment import describe_bundle, environment

SAVE_SECONDS = 60.0


class Reading:
    """One stream over a text that begins again at its end, and what was noted on the way.

    Args:
        scorer: reads it.
        stream: start tokens, then the text once.
    """

    def __init__(self, scorer: BundleScorer, stream: TokenStream) -> None:
        self.scorer = scorer
        self.head = stream.ids[: stream.num_start_tokens]
        self.text = stream.ids[stream.num_start_tokens :]
        self.done = 0
        self.seconds = 0.0
        self.run = 1  # counts processes: memory is compared within one
        self.readings: list[dict[str, Any]] = []
        self.marks: list[dict[str, Any]] = []
        # Nats of the text's tokens in the second reading, and in the one that goes on.
        self.second = np.full(len(self.text), np.nan, np.float32)
        self.present = np.full(len(self.text), np.nan, np.float32)
        self._mark_nats = 0.0

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the ids at positions start … stop − 1 of the stream."""
        places = np.arange(start, stop)
        body = self.text[(places - len(self.head)) % len(self.text)]
        if start >= len(self.head):
            return body
        return np.where(places < len(self.head), np.resize(self.head, len(places)), body)

    def step(self, limit: int) -> None:
        """Read one chunk, at most up to a position, and note the nats of what came behind it."""
        stop = min(self.done + self.scorer.chunk_size, limit)
        ids = self.tokens(self.done, stop + 1)
        began = time.perf_counter()
        losses = self.scorer.score(ids[:-1], ids[1:])
        self.seconds += time.perf_counter() - began
        self._mark_nats += float(losses.sum(dtype=np.float64))
        self._note(self.done + 1 - len(self.head), losses)
        self.done = stop

    def _note(self, first: int, losses: NDArray[np.float32]) -> None:
        """Put losses of the text's tokens first, first + 1, … of all readings in their places."""
        size = len(self.text)
        for offset, loss in enumerate(losses, start=first):
            if offset < 0:
                continue
            place = offset % size
            self.present[place] = loss
            if place == size - 1:
                self._end_reading(offset // size + 1)

    def _end_reading(self, number: int) -> None:
        nats = self.present.astype(np.float64)
        row = {"reading": number, "perplexity": float(np.exp(np.nanmean(nats)))}
        if number == 2:
            self.second = self.present.copy()
        if number > 2:
            difference = np.abs(nats - self.second)
            row["largest_difference_nats"] = float(difference.max())
            row["mean_difference_nats"] = float(difference.mean())
        self.readings.append(row)

    def mark(self, every: int) -> None:
        """Note memory, time and the perplexity since the last mark."""
        gc.collect()
        before = sum(row["seconds"] for row in self.marks)
        row = {
            "tokens": self.done,
            "perplexity": float(np.exp(self._mark_nats / every)),
            "seconds": round(self.seconds - before, 2),
            "run": self.run,
            "rss_bytes": psutil.Process().memory_info().rss,
            "cache_bytes": self.scorer.nbytes,
        }
        self._mark_nats = 0.0
        self.marks.append(row)
        print(row, file=sys.stderr, flush=True)

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Keep all of it in a file, which is replaced at once."""
        meta = {
            "identity": identity,
            "done": self.done,
            "seconds": self.seconds,
            "run": self.run,
            "readings": self.readings,
            "marks": self.marks,
            "mark_nats": self._mark_nats,
        }
        arrays = {f"cache/{name}": array for name, array in (self.scorer.snapshot() or {}).items()}
        arrays |= {"second": self.second, "present": self.present}
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with fresh.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub declares bool
        fresh.replace(path)

    def restore(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from such a file."""
        with np.load(path) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            if meta["identity"] != identity:
                raise SystemExit(f"{path} is the state of another run; name another file")
            self.done, self.seconds = meta["done"], meta["seconds"]
            self.run = meta["run"] + 1
            self.readings, self.marks = meta["readings"], meta["marks"]
            self._mark_nats = meta["mark_nats"]
            self.second, self.present = arrays["second"], arrays["present"]
            names = (name for name in arrays.files if name.startswith("cache/"))
            self.scorer.restore({name.removeprefix("cache/"): arrays[name] for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path, action="append")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--every", type=int, default=1_000_000, help="tokens between marks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.tokens % arguments.every:
        parser.error("--tokens must be a multiple of --every")
    model = lminf_export.load(arguments.bundle, threads=arguments.threads)
    stream = read_stream(model.codec, arguments.text)
    reading = Reading(BundleScorer(model), stream)
    manifest = model.bundle.manifest
    described = {**describe_bundle(manifest), "attention": model.session.attention}
    identity = {**described, "text_sha256": stream.sha256, "every": arguments.every}
    if arguments.state is not None and arguments.state.exists():
        reading.restore(arguments.state, identity)
    saved = time.monotonic()
    for target in range(arguments.every, arguments.tokens + 1, arguments.every):
        while reading.done < target:
            reading.step(target)
            if arguments.state is not None and time.monotonic() - saved > SAVE_SECONDS:
                reading.save(arguments.state, identity)
                saved = time.monotonic()
        if len(reading.marks) * arguments.every >= target:
            continue
        reading.mark(arguments.every)
        write_result(arguments.out, summary(reading, stream, described, arguments.threads))
        if arguments.state is not None:
            reading.save(arguments.state, identity)


def summary(
    reading: Reading, stream: TokenStream, described: dict[str, Any], threads: int
) -> dict[str, Any]:
    """Return the result as JSON can hold it."""
    runs: dict[int, list[int]] = {}
    for row in reading.marks:
        runs.setdefault(row["run"], []).append(row["rss_bytes"])
    growth = max(max(memory) / min(memory) - 1 for memory in runs.values())
    later = [row for row in reading.readings if "largest_difference_nats" in row]
    return {
        "evaluation": "long reading",
        **described,
        "texts": list(stream.names),
        "text_sha256": stream.sha256,
        "text_tokens": len(reading.text),
        "threads": threads,
        "tokens": reading.done,
        "seconds": round(reading.seconds, 1),
        "marks": reading.marks,
        "readings": reading.readings,
        "largest_difference_nats": max(
            (row["largest_difference_nats"] for row in later), default=None
        ),
        "rss_growth_within_a_run": round(growth, 5),
        **environment(),
    }


if __name__ == "__main__":
    main()
