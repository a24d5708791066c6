"""How far logits are from others, of a whole stream that is seen a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]

# Logits of one block of tokens: 64 MiB in float64.
BLOCK_ELEMENTS = 2**23
# Elements whose differences are computed at a time.
_SCRATCH_ELEMENTS = 2**20


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


@dataclass
class LogitRange:
    """The range of a reference's logits, over the blocks seen so far."""

    lowest: float = np.inf
    highest: float = -np.inf

    def add(self, wanted: Logits) -> None:
        """Take a block (n, V) into account."""
        self.lowest = float(np.minimum(self.lowest, wanted.min()))
        self.highest = float(np.maximum(self.highest, wanted.max()))

    @property
    def size(self) -> float:
        """Highest minus lowest."""
        return self.highest - self.lowest


@dataclass
class Differences:
    """The differences of two streams of logits, over the blocks seen so far.

    Attributes:
        tokens: positions.
        largest: absolute difference; NaN if there was one.
        total: of the absolute differences of all logits.
        elements: their number.
        agreeing: positions with the same best token.
    """

    tokens: int = 0
    largest: float = 0.0
    total: float = 0.0
    elements: int = 0
    agreeing: int = 0

    def add(self, found: Logits, wanted: Logits) -> None:
        """Take blocks (n, V) of the same positions into account."""
        self.tokens += len(wanted)
        self.elements += wanted.size
        rows = max(1, _SCRATCH_ELEMENTS // wanted.shape[1])
        for start in range(0, len(wanted), rows):
            left, right = found[start : start + rows], wanted[start : start + rows]
            error = np.subtract(left, right, dtype=np.float64)
            np.abs(error, out=error)
            self.largest = float(np.maximum(self.largest, error.max()))
            self.total += float(error.sum())
            self.agreeing += int((left.argmax(-1) == right.argmax(-1)).sum())

    def relative_to(self, scale: LogitRange, name: str, tolerance: float) -> Comparison:
        """Return the comparison relative to the reference's range."""
        return Comparison(
            name=name,
            tokens=self.tokens,
            max_error=self.largest / scale.size,
            mean_error=self.total / self.elements / scale.size,
            argmax_agreement=self.agreeing / self.tokens,
            tolerance=tolerance,
        )


def token_blocks(num_tokens: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the blocks of tokens whose logits are in memory together."""
    step = max(1, BLOCK_ELEMENTS // vocab_size)
    for start in range(0, num_tokens, step):
        yield start, min(start + step, num_tokens)
