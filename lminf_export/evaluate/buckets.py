"""Positions in buckets that grow geometrically, and what is said about each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Neighbouring tokens are not independent; the bootstrap resamples runs of this many.
BLOCK_TOKENS = 64
RESAMPLES = 1000
LEVEL = 0.95
# Below it a bucket would be a handful of targets.
SMALLEST_EDGE = 16


@dataclass(frozen=True)
class Bucket:
    """Targets whose context has more than ``low`` and at most ``high`` tokens."""

    low: int
    high: int


@dataclass(frozen=True)
class Estimate:
    """A perplexity with its interval.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        low: lower end of the 95 % bootstrap interval over runs of 64 tokens.
        high: upper end.
        targets: tokens it is made of.
    """

    perplexity: float
    low: float
    high: float
    targets: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def log_buckets(num_tokens: int, unit: int | None, per_octave: int = 1) -> list[Bucket]:
    """Return buckets of context lengths 1 … num_tokens − 1, with edges at unit · 2^k.

    Args:
        num_tokens: length T of the stream; its last target has T − 1 tokens before it.
        unit: the training length, which is an edge; 256 where it is not known.
        per_octave: buckets per doubling.
    """
    unit = unit or 256
    edges = [0]
    exponent = min(0, -int(np.log2(unit / SMALLEST_EDGE)) * per_octave)
    while edges[-1] < num_tokens - 1:
        edge = round(unit * 2 ** (exponent / per_octave))
        exponent += 1
        if edge > edges[-1]:
            edges.append(min(edge, num_tokens - 1))
    return [Bucket(a, b) for a, b in pairwise(edges)]


def estimate(losses: NDArray[np.floating], seed: int = 0) -> Estimate:
    """Return perplexity and interval of losses (n,) in text order, n ≥ 1."""
    means, weights = _blocks(losses)
    low, high = np.exp(_interval(means, weights, seed))
    mean = float(np.average(means, weights=weights))
    return Estimate(float(np.exp(mean)), float(low), float(high), len(losses))


def ratio(
    losses: NDArray[np.floating], others: NDArray[np.floating], seed: int = 0
) -> dict[str, float]:
    """Return the ratio of two perplexities on the same targets, (n,) each, with its interval."""
    means, weights = _blocks(np.asarray(losses, np.float64) - others)
    low, high = np.exp(_interval(means, weights, seed))
    mean = float(np.exp(np.average(means, weights=weights)))
    return {"ratio": mean, "low": float(low), "high": float(high)}


def _blocks(values: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of runs of neighbours and their sizes; shorter runs where there are few values."""
    size = min(BLOCK_TOKENS, max(1, len(values) // 20))
    starts = np.arange(0, len(values), size)
    sums = np.add.reduceat(np.asarray(values, np.float64), starts)
    weights = np.diff(np.append(starts, len(values))).astype(np.float64)
    return sums / weights, weights


def _interval(means: NDArray[np.float64], weights: NDArray[np.float64], seed: int) -> Any:
    """Quantiles of the mean over resampled blocks."""
    dice = np.random.default_rng(seed)
    found = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = dice.integers(0, len(means), len(means))
        found[index] = np.average(means[drawn], weights=weights[drawn])
    return np.quantile(found, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
