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
import os
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
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.verify.likelihood import negative_log_likelihood

CROSSED = 200_000_000
OTHER_CHUNK = 192
FLOOR_TOKENS = 100_000
SAVE_SECONDS = 60.0
STREAMS = ("near", "far", "other")


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


class Pair:
    """Two streams over the same text, one from its beginning and one far away, and what they gave.

    Args:
        model: an export.
        ids: (T,) the text, longer than `begin` and the tokens that are compared.
        tokens: how many are compared; the second stream then stands behind CROSSED.

    Attributes:
        begin: where in the text the comparison begins.
        done: tokens compared.
    """

    def __init__(self, model: LanguageModel, ids: NDArray[np.int64], tokens: int) -> None:
        self.model, self.ids, self.tokens = model, ids, tokens
        self.chunk = model.bundle.manifest.lambda_config.chunk_size
        lead, warm_up = lengths(model)
        self.begin, self.done, self.seconds = lead + warm_up, 0, 0.0
        self.first_far = CROSSED - tokens + warm_up
        self.moved, self.floor = Difference(), Difference()
        self.near, self.far, self.other = (model.new_state() for _ in range(3))

    def warm_up(self) -> None:
        """Bring both streams to where they have to agree."""
        lead, warm_up = lengths(self.model)
        session, ids = self.model.session, self.ids[None]
        self.model.forward(ids[:, :lead], self.near, logits="none")
        session.restore(self.far, session.snapshot(self.near))
        session.stand_at(self.far, CROSSED - self.tokens)
        for state in (self.near, self.far):
            self.model.forward(ids[:, lead : lead + warm_up], state, logits="none")
        session.restore(self.other, session.snapshot(self.near))

    def step(self) -> None:
        """Read a few chunks with both and compare every logit."""
        begun = time.perf_counter()
        start = self.begin + self.done
        # A multiple of both chunk sizes.
        stop = min(start + 3 * self.chunk, self.begin + self.tokens)
        part, targets = self.ids[start:stop], self.ids[start + 1 : stop + 1]
        ours = logits(self.model, self.near, part, self.chunk)
        self.moved.add(ours, logits(self.model, self.far, part, self.chunk), targets)
        if self.done < FLOOR_TOKENS:
            self.floor.add(ours, logits(self.model, self.other, part, OTHER_CHUNK), targets)
        self.done += len(part)
        self.seconds += time.perf_counter() - begun

    def save(self, path: Path, identity: Any) -> None:
        """Keep the streams and the differences in a file, which is replaced at once."""
        numbers = {"done": self.done, "seconds": self.seconds, "of": identity}
        told = {**numbers, "moved": vars(self.moved), "floor": vars(self.floor)}
        arrays = {"meta": np.frombuffer(json.dumps(told).encode(), np.uint8)}
        for name in STREAMS:
            found = self.model.session.snapshot(getattr(self, name)).to_arrays()
            arrays |= {f"{name}/{key}": array for key, array in found.items()}
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with fresh.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub declares bool
        fresh.replace(path)

    def restore(self, path: Path, identity: Any) -> None:
        """Go on from such a file."""
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        told = json.loads(found.pop("meta").tobytes())
        if told["of"] != identity:
            raise SystemExit(f"{path} is the state of another run; name another folder")
        self.done, self.seconds = told["done"], told["seconds"]
        vars(self.moved).update(told["moved"])
        vars(self.floor).update(told["floor"])
        for name in STREAMS:
            state = getattr(self, name)
            own = {k.removeprefix(f"{name}/"): a for k, a in found.items() if k.startswith(name)}
            snapshot = Snapshot.from_arrays(state.contract, own)
            self.model.session.restore(state, snapshot)


def lengths(model: LanguageModel) -> tuple[int, int]:
    """Return tokens of the lead, behind which sinks have left the window, and of the warm-up."""
    settings = model.bundle.manifest.lambda_config
    chunk = settings.chunk_size
    lead = -(-(settings.window_size + settings.num_sink_tokens) // chunk) + 1
    return lead * chunk, -(-reach(model) // chunk) * chunk


def measure(
    path: Path,
    files: list[Path],
    kernels: str,
    tokens: int,
    threads: int,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Read the text with both streams and compare every logit; the text begins again at its end.

    Args:
        path: a bundle.
        files: the text.
        kernels: see `load`.
        tokens: how many are compared.
        threads: of an operator.
        folder: where half-done work is kept.
    """
    model = lminf_export.load(path, threads=threads, kernels=kernels)
    manifest = model.bundle.manifest
    total = sum(lengths(model)) + tokens
    stream = read_stream(model.codec, files, max_tokens=total + 1, repeat=True)
    pair = Pair(model, stream.ids, tokens)
    identity = [manifest.manifest_sha256, stream.sha256, tokens, model.session.attention]
    kept = None if folder is None else folder / f"far-{path.name}-{kernels}.npz"
    if kept is not None and kept.exists():
        pair.restore(kept, identity)
    else:
        pair.warm_up()
    saved = time.monotonic()
    while pair.done < tokens:
        pair.step()
        if kept is not None and (time.monotonic() - saved > SAVE_SECONDS or pair.done == tokens):
            pair.save(kept, identity)
            saved = time.monotonic()
            print(f"{path.name} {kernels}: {pair.moved.to_dict()}", file=sys.stderr, flush=True)
    return {
        **describe_bundle(manifest),
        "attention": model.session.attention,
        "text_sha256": stream.sha256,
        "text_tokens": stream.text_tokens,
        "from_position": pair.first_far,
        "to_position": int(pair.far.past_length[0]),
        "beside_positions": [pair.begin, total],
        "ring_slots": sorted({layer.ring_capacity for layer in manifest.layers}),
        "warm_up_tokens": lengths(model)[1],
        "moved": pair.moved.to_dict(),
        "floor": {"chunk": OTHER_CHUNK, **pair.floor.to_dict()},
        "seconds": round(pair.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path, nargs="+")
    parser.add_argument("--text", required=True, type=Path, nargs="+")
    parser.add_argument("--kernels", nargs="+", default=["auto", "none"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder from which an interrupted run goes on")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"evaluation": "far positions", "crossed": CROSSED, "rows": {}}
    if arguments.out is not None and arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    for path in arguments.bundle:
        for kernels in arguments.kernels:
            name = f"{path.name}, kernels {kernels}"
            there = result["rows"].get(name)
            if there and there["moved"]["tokens_compared"] >= arguments.tokens:
                continue
            result["rows"][name] = measure(
                path, arguments.text, kernels, arguments.tokens, arguments.threads, arguments.work
            )
            write_result(arguments.out, {**result, **environment()})


if __name__ == "__main__":
    main()
