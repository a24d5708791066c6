"""The check of a family's export: against stock transformers, and an oracle far beyond."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.support.families import CHUNK, SINKS, WINDOW, FamilyCase
from benchmarks.support.family_oracle import Rule, oracle_logits
from lminf_export import LanguageModel, export, load
from lminf_export.runtime.kernels import NONE

TOLERANCE = 2e-5  # of the logits' range: the contract for float32
LENGTHS = (6 * WINDOW + 3, 5 * WINDOW + 1)  # of the batch's two texts
QUICK_LENGTHS = (3 * WINDOW + 1, 2 * WINDOW + 5)  # every ring has wrapped all the same
CHUNKS = ((3, 1), (1, 7), (7, 2), (0, 5), (19, 3), (2, 0), (5, 31), (1, 1), (41, 2))


@dataclass(frozen=True)
class FamilyErrors:
    """Largest differences of a logit, each relative to the range of what it is compared with.

    Chunks are run by the installed kernels and by the graph's own body, the larger one counts.
    """

    stock: float
    token_by_token: float
    in_chunks: float


def export_family(case: FamilyCase, folder: Path, lambda_layers: str = "full") -> None:
    """Write a family's model to folder/m and its bundle to folder/b."""
    export(
        case.save(folder / "m"),
        folder / "b",
        window_size=WINDOW,
        num_sink_tokens=SINKS,
        chunk_size=CHUNK,
        lambda_layers=lambda_layers,
    )


def measure_family(
    case: FamilyCase,
    folder: Path,
    lambda_layers: str = "full",
    lengths: Sequence[int] = LENGTHS,
) -> FamilyErrors:
    """Measure what `export_family` has written, on two texts of these lengths."""
    source = folder / "m"
    own_sinks = SINKS if lambda_layers == "all" else 0
    rules = [
        Rule(WINDOW, SINKS, WINDOW) if own is None else Rule(own, own_sinks, own)
        for own in case.windows
    ]
    layers = json.loads((folder / "b" / "lminf.json").read_text())["layers"]
    names = ("window_size", "num_sink_tokens", "distance_limit")
    assert [Rule(*(layer[name] for name in names)) for layer in layers] == rules
    model = load(folder / "b")
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, model.vocab_size, length) for length in lengths]
    wanted = [oracle_logits(source, rules, torch.from_numpy(text)).numpy() for text in texts]
    return FamilyErrors(
        stock=stock_error(model, source, case.stock, texts[0][: _common_length(rules)]),
        token_by_token=stream_error(model, texts, wanted, [(1, 1)]),
        in_chunks=max(
            stream_error(model, texts, wanted, CHUNKS),
            stream_error(load(folder / "b", kernels=NONE), texts, wanted, CHUNKS),
        ),
    )


def _common_length(rules: list[Rule]) -> int:
    """Up to here nothing is a sink, so the model must equal the unmodified one."""
    return min([WINDOW, *(rule.window for rule in rules if rule.sinks)])


@torch.no_grad()
def stock_error(
    model: LanguageModel, source: Path, attention: str | None, tokens: np.ndarray
) -> float:
    """Return the largest difference to stock transformers on tokens (T,) inside the window."""
    stock = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        attn_implementation=attention,
        experts_implementation="eager",
    )
    wanted = stock.eval()(torch.from_numpy(tokens[None]), use_cache=False).logits[0].numpy()
    got = model.forward(tokens[None], model.new_state())[0]
    return float(np.abs(got - wanted).max() / np.ptp(wanted))


def stream_error(
    model: LanguageModel,
    texts: list[np.ndarray],
    wanted: list[np.ndarray],
    pattern: Sequence[tuple[int, int]],
) -> float:
    """Feed a batch of two texts in pieces of different lengths; both end where they end."""
    state, error, step = model.new_state(2), 0.0, 0
    while True:
        before = state.past_length.copy()
        left = [len(text) - int(done) for text, done in zip(texts, before, strict=True)]
        if not any(left):
            return error
        lengths = np.minimum(left, pattern[step % len(pattern)])
        step += 1
        ids = np.full((2, max(1, int(lengths.max()))), 3)
        for row, text in enumerate(texts):
            ids[row, : lengths[row]] = text[before[row] : before[row] + lengths[row]]
        logits = model.forward(ids, state, lengths=lengths)
        for row in range(2):
            right = wanted[row][before[row] : before[row] + lengths[row]]
            if lengths[row]:
                difference = np.abs(logits[row, : lengths[row]] - right).max()
                error = max(error, float(difference / np.ptp(wanted[row])))
