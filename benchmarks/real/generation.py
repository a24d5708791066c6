"""A long text that the real model writes, in pieces, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lminf_export
from lminf_export.evaluate.fluency import describe_segments
from lminf_export.evaluate.text import read_stream
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.sampling import Sampler, SamplingConfig
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.verify.likelihood import negative_log_likelihood

SEGMENT = 5000
# Each piece is drawn with a seed of its own, and kept when it is written.
PIECE = 500
PROMPT_TOKENS = 256
HUMAN_SEGMENTS = 4
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Stream:
    """A text to write, and how.

    Attributes:
        name: of its file.
        tokens: how many, a multiple of SEGMENT.
        top_p: share of the probability from which tokens are drawn.
        settings: of the export, beside its quantisation.
    """

    name: str
    tokens: int
    top_p: float
    settings: dict[str, Any]


class Writing:
    """One stream that a model writes, with the nats that it gave to each token.

    Args:
        model: the export.
        prompt: (P,) ids it continues.
        top_p: share of the probability from which tokens are drawn.
        kept: file from which it goes on.
    """

    def __init__(
        self, model: LanguageModel, prompt: NDArray[np.int64], top_p: float, kept: Path
    ) -> None:
        self.model, self.prompt, self.top_p, self.kept = model, prompt, top_p, kept
        self.state = model.new_state()
        self.ids, self.losses = np.empty(0, np.int64), np.empty(0, np.float32)
        self.seconds = 0.0
        if kept.exists():
            with np.load(kept) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            self.ids, self.losses = found.pop("written"), found.pop("losses")
            self.seconds = float(found.pop("seconds"))
            snapshot = Snapshot.from_arrays(self.state.contract, found)
            model.session.restore(self.state, snapshot)

    def piece(self) -> None:
        """Write PIECE tokens and keep them; the last one has not been read yet."""
        begun = time.perf_counter()
        config = SamplingConfig(temperature=TEMPERATURE, top_p=self.top_p, seed=len(self.ids))
        sampler = Sampler(config, self.model.vocab_size, 1)
        behind = self.ids[-1:] if len(self.ids) else self.prompt
        ids, losses = [], []
        for _ in range(PIECE):
            logits = self.model.forward(behind[None], self.state, logits="last")
            assert logits is not None
            ids.append(sampler.choose(logits[0, 0]))
            behind = np.array(ids[-1:], np.int64)
            losses.append(negative_log_likelihood(logits[0], behind)[0])
        self.seconds += time.perf_counter() - begun
        self.ids = np.append(self.ids, np.array(ids, np.int64))
        self.losses = np.append(self.losses, np.array(losses, np.float32))
        self._save()

    def _save(self) -> None:
        arrays = dict(self.model.session.snapshot(self.state).to_arrays())
        arrays |= {"written": self.ids, "losses": self.losses, "seconds": np.array(self.seconds)}
        fresh = self.kept.with_name(f".{self.kept.name}.{os.getpid()}")
        with fresh.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub declares bool
        fresh.replace(self.kept)


def generate(stream: Stream, bundle: Path, text: Path, work: Path, out: Path, threads: int) -> None:
    """Continue the first tokens of a text, and measure what is written and what the author wrote.

    Args:
        stream: what to write.
        bundle: the export.
        text: its first PROMPT_TOKENS tokens are continued; what follows is measured beside.
        work: folder of the state from which it goes on.
        out: the JSON, written anew whenever a segment is done.
        threads: of an operator.
    """
    model = lminf_export.load(bundle, threads=threads)
    length = PROMPT_TOKENS + HUMAN_SEGMENTS * SEGMENT
    ids = read_stream(model.codec, [text], max_tokens=length).ids
    kept = work / f"{stream.name}.npz"
    writing = Writing(model, ids[:PROMPT_TOKENS], stream.top_p, kept)
    while len(writing.ids) < stream.tokens:
        writing.piece()
        print(f"{stream.name}: {len(writing.ids)} tokens", file=sys.stderr, flush=True)
        if len(writing.ids) % SEGMENT == 0:
            _write(out, model, writing, ids, threads)


def _write(
    out: Path, model: LanguageModel, writing: Writing, ids: NDArray[np.int64], threads: int
) -> None:
    human = json.loads(out.read_text(encoding="utf-8"))["reference"] if out.is_file() else None
    result = {
        "evaluation": "generation",
        **describe_bundle(model.bundle.manifest),
        "attention": model.session.attention,
        "threads": threads,
        "prompt_tokens": PROMPT_TOKENS,
        "tokens": len(writing.ids),
        "segment": SEGMENT,
        "temperature": TEMPERATURE,
        "top_p": writing.top_p,
        "seconds": round(writing.seconds, 1),
        "segments": describe_segments(writing.ids, writing.losses, SEGMENT),
        "reference": human or {"segments": _human(model, ids)},
        **environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_suffix(".new")
    fresh.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(out)


def _human(model: LanguageModel, ids: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Measure what the author wrote behind the prompt."""
    state, losses = model.new_state(), []
    for start in range(0, len(ids) - 1, 256):
        part = ids[start : min(start + 256, len(ids) - 1)]
        logits = model.forward(part[None], state)
        assert logits is not None
        losses.append(negative_log_likelihood(logits[0], ids[start + 1 : start + 1 + len(part)]))
    found = np.concatenate(losses)[PROMPT_TOKENS - 1 :]
    return describe_segments(ids[PROMPT_TOKENS:], found, SEGMENT)
