"""Edits of logits before a token is drawn: tokens that were seen or written, and biases.

Repetition penalty → frequency and presence penalty → bias, each on the result of the one before.
Only the logits of the tokens concerned are read and written, and taken back after the draw: a copy
of a large vocabulary would take longer than the draw itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

# Takes the logits (M,) of some ids; returns them changed.
Change = Callable[[np.ndarray], np.ndarray]
# Ids (M,), each once, and how their logits change.
Edit = tuple[np.ndarray, Change]


class CountedTokens:
    """The different tokens among the last ones, and how often each is there.

    Args:
        memory: how many tokens are the last ones.
        vocab_size: V.
    """

    def __init__(self, memory: int, vocab_size: int) -> None:
        self._recent: deque[int] = deque(maxlen=memory)
        self._places: dict[int, int] = {}
        size = min(memory, vocab_size)
        self._ids = np.zeros(size, np.int64)
        self._counts = np.zeros(size, np.int64)

    @property
    def ids(self) -> np.ndarray:
        """Ids (M,), each once, in no order; valid until the next `add`."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` is there, (M,), at least once; valid until the next `add`."""
        return self._counts[: len(self._places)]

    def add(self, token_ids: Sequence[int]) -> None:
        """Add tokens; the oldest are forgotten."""
        for token in token_ids:
            if len(self._recent) == self._recent.maxlen:
                self._forget(self._recent[0])
            self._recent.append(token)
            place = self._places.get(token)
            if place is None:
                place = self._places[token] = len(self._places)
                self._ids[place] = token
                self._counts[place] = 1
            else:
                self._counts[place] += 1

    def _forget(self, token: int) -> None:
        place = self._places[token]
        if self._counts[place] > 1:
            self._counts[place] -= 1
            return
        # The last one takes its place.
        del self._places[token]
        end = len(self._places)
        if place != end:
            last = int(self._ids[end])
            self._ids[place], self._counts[place] = last, self._counts[end]
            self._places[last] = place


@contextmanager
def edited(logits: np.ndarray, edits: Sequence[Edit]) -> Iterator[np.ndarray]:
    """Edit logits for as long as the block runs.

    Args:
        logits: (V,) floats; edited in place where that is possible, and as before at the end.
        edits: ids, each once, and how their logits change; in this order.

    Returns:
        (V,), the edited logits.
    """
    writable = logits.flags.writeable
    result = logits if writable else logits.copy()
    before: list[tuple[np.ndarray, np.ndarray]] = []
    try:
        for ids, change in edits:
            old = result[ids]
            before.append((ids, old))
            result[ids] = change(old)
        yield result
    finally:
        if writable:
            for ids, old in reversed(before):
                result[ids] = old


def repetition_penalty(penalty: float) -> Change:
    """Return what makes tokens less likely: positive logits divided, negative multiplied.

    Finite logits stay finite: what no longer fits the type becomes its largest number.
    """

    def change(logits: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            changed = np.where(logits < 0, logits * penalty, logits / penalty)
            if math.isfinite(changed.sum()):
                return changed
        largest = np.finfo(logits.dtype).max
        return np.where(np.isfinite(logits), np.clip(changed, -largest, largest), logits)

    return change


def count_penalty(frequency: float, presence: float, counts: np.ndarray) -> Change:
    """Return what takes from each logit `frequency` for every occurrence, and `presence` once."""
    return lambda logits: logits - (frequency * counts + presence)


def bias(amounts: np.ndarray) -> Change:
    """Return what adds an amount (M,) to each logit."""
    return lambda logits: logits + amounts
