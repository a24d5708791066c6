"""Interpolated Kneser–Ney n-gram model over token ids: the bar a demo model has to clear.

It shares the demo model's tokenizer, so that the two losses are comparable token by token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Ngram = tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """The discounted counts of one n-gram length."""

    counts: Counter[Ngram]
    context_totals: Counter[Ngram]
    context_types: Counter[Ngram]
    discount: float


def loss_under(levels: list[Level], heldout_ids: Sequence[int], vocab_size: int) -> float:
    """Return the mean loss, in nats per token, of a Kneser–Ney model on held-out ids.

    Every token sees the tokens before it that the highest level takes (fewer at the very start),
    with none of the window boundaries a neural model is scored with. Method: Chen and
    Goodman 1999, section 2.7, one discount per order.
    """
    total = 0.0
    for position, token in enumerate(heldout_ids):
        context = tuple(heldout_ids[max(0, position - len(levels) + 1) : position])
        total -= math.log(_probability(levels, context, token, vocab_size))
    return total / len(heldout_ids)


def build_levels(train_ids: Sequence[int], order: int = 5) -> list[Level]:
    """Levels for lengths 1 to ``order``: raw counts at the top, continuation counts below."""
    ids = list(train_ids)
    raw = _count_ngrams(ids, order)
    levels = [_level(raw)]
    for length in range(order - 1, 0, -1):
        # A continuation count is the number of distinct tokens seen before the n-gram.
        counts = Counter(ngram[1:] for ngram in _count_ngrams(ids, length + 1))
        levels.insert(0, _level(counts))
    return levels


def _count_ngrams(ids: list[int], length: int) -> Counter[Ngram]:
    return Counter(zip(*(ids[start:] for start in range(length)), strict=False))


def _level(counts: Counter[Ngram]) -> Level:
    totals: Counter[Ngram] = Counter()
    types: Counter[Ngram] = Counter()
    for ngram, count in counts.items():
        totals[ngram[:-1]] += count
        types[ngram[:-1]] += 1
    frequencies = Counter(counts.values())
    # The leave-one-out estimate of the discount (Ney, Essen and Kneser 1994).
    discount = frequencies[1] / (frequencies[1] + 2 * frequencies[2])
    return Level(counts, totals, types, discount)


def _probability(levels: list[Level], context: Ngram, token: int, vocab_size: int) -> float:
    """Interpolate from the uniform distribution up to the longest context seen in training."""
    probability = 1 / vocab_size
    for length in range(len(context) + 1):
        level = levels[length]
        suffix = context[len(context) - length :]
        total = level.context_totals[suffix]
        if total == 0:
            break
        kept = max(level.counts[(*suffix, token)] - level.discount, 0)
        backoff = level.discount * level.context_types[suffix]
        probability = (kept + backoff * probability) / total
    return probability
