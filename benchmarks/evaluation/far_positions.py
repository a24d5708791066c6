"""A million tokens read around position 200,000,000, against the same tokens read from position 0.

Two streams of one session read the same text. Once the first has read a few windows the second gets
its caches and is set to stand at 2·10⁸ − 10⁶. Rings hold keys rotated at their positions, so that
what the second was given does not fit its place: both read on until nothing of that is in reach of
any layer (a warm-up of 1,536 tokens for six layers of 256). From there the two must agree for a
million tokens, the last ones behind 2·10⁸, since the operator only sees distances. Sinks stay as
they were: the second stream's are the first tokens of the text, as in the first.

    python -m benchmarks.evaluation.far_positions --bundle DIR … --text FILE … \\
        --kernels auto none --out benchmarks/results/evidence/far-positions.json

Every logit is compared. `floor` is what rounding alone does: the first stream against a third that
reads the same tokens at the same positions in chunks of another size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lminf_export
from benchmarks.support.result import write_result
from lminf_export import LanguageModel
from lminf_export.evaluate.text import read_stream
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.verify.likelihood import negative_log_likelihood

CROSSED = 200_000_000
OTHER_CHUNK = 192
REPORT_TOKENS = 100_000


class Difference:
    """The largest and the mean difference of two streams' logits."""

    def __init__(self) -> None:
        self.largest = self.total = self.nats = self.range = 0.0
        self.tokens = self.same = 0

    def add(
        self, ours: NDArray[np.float32], others: NDArray[np.float32], targets: NDArray[np.int64]
    ) -> None:
        """Compare logits (S, V) of the same tokens; targets (S,) are what followed."""
        apart = np.abs(ours - others)
        self.largest = max(self.largest, float(apart.max()))
        self.total += float(apart.mean(-1, dtype=np.float64).sum())
        self.range = max(self.range, float((ours.max(-1) - ours.min(-1)).max()))
        losses = [negative_log_likelihood(x, targets) for x in (ours, others)]
        self.nats = max(self.nats, float(np.abs(losses[0] - losses[1]).max()))
        self.same += int((ours.argmax(-1) == others.argmax(-1)).sum())
        self.tokens += len(ours)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "tokens_compared": self.tokens,
            "largest_logit_difference": self.largest,
            "mean_logit_difference": self.total / self.tokens,
            "largest_logit_range": self.range,
            "largest_difference_nats": self.nats,
            "same_argmax": self.same / self.tokens,
        }


def reach(model: LanguageModel) -> int:
    """Return how many tokens back the last layer's output can depend on, sinks apart."""
    return 1 + sum(layer.window_size - 1 for layer in model.bundle.manifest.layers)


def logits(
    model: LanguageModel, state: Any, ids: NDArray[np.int64], chunk: int
) -> NDArray[np.float32]:
    """Read ids (S,) in chunks of a size; (S, V)."""
    parts = [
        model.forward(ids[None, start : start + chunk], state)
        for start in range(0, len(ids), chunk)
    ]
    return np.concatenate([part[0] for part in parts if part is not None])


def measure(
    path: Path, files: list[Path], kernels: str, tokens: int, threads: int
) -> dict[str, Any]:
    """Read the text with both streams and compare every logit; the text begins again at its end."""
    model = lminf_export.load(path, threads=threads, kernels=kernels)
    manifest = model.bundle.manifest
    chunk = manifest.lambda_config.chunk_size
    warm_up = -(-reach(model) // chunk) * chunk
    lead = -(
        -(manifest.lambda_config.window_size + manifest.lambda_config.num_sink_tokens) // chunk
    )
    lead = (lead + 1) * chunk
    total = lead + warm_up + tokens
    stream = read_stream(model.codec, files, max_tokens=total + 1, repeat=True)
    ids = stream.ids
    near, far = model.new_state(), model.new_state()
    model.forward(ids[None, :lead], near, logits="none")
    model.session.restore(far, model.session.snapshot(near))
    model.session.stand_at(far, CROSSED - tokens)
    for state in (near, far):
        model.forward(ids[None, lead : lead + warm_up], state, logits="none")
    begin = lead + warm_up
    other = model.new_state()
    model.session.restore(other, model.session.snapshot(near))
    moved, floor = Difference(), Difference()
    begun = reported = time.perf_counter()
    piece = 3 * chunk  # a multiple of both chunk sizes
    first_far = int(far.past_length[0])
    for start in range(begin, total, piece):
        part = ids[start : min(start + piece, total)]
        targets = ids[start + 1 : start + 1 + len(part)]
        ours = logits(model, near, part, chunk)
        moved.add(ours, logits(model, far, part, chunk), targets)
        if floor.tokens < REPORT_TOKENS:
            floor.add(ours, logits(model, other, part, OTHER_CHUNK), targets)
        if time.perf_counter() - reported > 60:
            reported = time.perf_counter()
            print(f"{path.name} {kernels}: {moved.to_dict()}", file=sys.stderr, flush=True)
    return {
        **describe_bundle(manifest),
        "attention": model.session.attention,
        "text_sha256": stream.sha256,
        "text_tokens": stream.text_tokens,
        "from_position": first_far,
        "to_position": int(far.past_length[0]),
        "beside_positions": [begin, total],
        "ring_slots": sorted({layer.ring_capacity for layer in manifest.layers}),
        "warm_up_tokens": warm_up,
        "moved": moved.to_dict(),
        "floor": {"chunk": OTHER_CHUNK, **floor.to_dict()},
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path, nargs="+")
    parser.add_argument("--text", required=True, type=Path, nargs="+")
    parser.add_argument("--kernels", nargs="+", default=["auto", "none"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"evaluation": "far positions", "crossed": CROSSED, "rows": {}}
    if arguments.out is not None and arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    for path in arguments.bundle:
        for kernels in arguments.kernels:
            found = measure(path, arguments.text, kernels, arguments.tokens, arguments.threads)
            result["rows"][f"{path.name}, kernels {kernels}"] = found
            write_result(arguments.out, {**result, **environment()})


if __name__ == "__main__":
    main()
