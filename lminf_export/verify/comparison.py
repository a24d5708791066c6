"""Logits of a whole stream, however it is cut into pieces, and how far they are from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from lminf_export.runtime.language_model import LanguageModel

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """One way of running the bundle against the reference.

    Attributes:
        name: what was compared.
        tokens: number of positions.
        max_error: largest difference of a logit, relative to the reference's range.
        mean_error: mean difference, relative to the same range.
        argmax_agreement: share of positions whose best token is the same, 0 … 1.
        tolerance: largest max_error that passes.
    """

    name: str
    tokens: int
    max_error: float
    mean_error: float
    argmax_agreement: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the largest error is within the tolerance; NaN is not."""
        return self.max_error <= self.tolerance


def run_in_pieces(
    model: LanguageModel,
    tokens: NDArray[np.int64],
    sizes: Sequence[int],
    report: Callable[[float], None] = lambda _: None,
) -> Logits:
    """Feed a stream (T,) in pieces of repeating sizes; return logits (T, V)."""
    state = model.new_state(1)
    found: list[Logits] = []
    start = 0
    for size in cycle(sizes):
        if start >= len(tokens):
            return np.concatenate(found)
        logits = model.forward(tokens[None, start : start + size], state)
        assert logits is not None
        found.append(logits[0])
        start += size
        report(min(start / len(tokens), 1.0))
    raise AssertionError("sizes must not be empty")


def compare(name: str, logits: Logits, wanted: Logits, tolerance: float) -> Comparison:
    """Compare logits (T, V) with the reference's, relative to the reference's range."""
    scale = float(wanted.max() - wanted.min())
    error = np.abs(logits.astype(np.float64) - wanted) / scale
    same = logits.argmax(-1) == wanted.argmax(-1)
    return Comparison(
        name=name,
        tokens=len(wanted),
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        argmax_agreement=float(same.mean()),
        tolerance=tolerance,
    )
