"""The cost of quantisation on a text: perplexity with and without it, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.verify.likelihood import negative_log_likelihood


@dataclass(frozen=True)
class PerplexityCost:
    """Two perplexities over the same predictions.

    Attributes:
        tokens: predictions scored.
        unquantized: perplexity of the original model, with Λ-attention.
        quantized: perplexity of the bundle.
        cost: quantized / unquantized − 1.
        standard_error: of the cost, over tokens.
    """

    tokens: int
    unquantized: float
    quantized: float
    cost: float
    standard_error: float


def perplexity_cost(unquantized: Any, quantized: Any, tokens: NDArray[np.int64]) -> PerplexityCost:
    """Compare the logits (T, V) of two models on one text's tokens (T,)."""
    before = negative_log_likelihood(unquantized[:-1], tokens[1:], np.float64)
    after = negative_log_likelihood(quantized[:-1], tokens[1:], np.float64)
    return cost_of(before, after)


def cost_of(before: NDArray[np.float64], after: NDArray[np.float64]) -> PerplexityCost:
    """Compare two models by the nats (T,) that the same tokens cost them."""
    difference = after - before
    ratio = float(np.exp(difference.mean()))
    return PerplexityCost(
        tokens=len(before),
        unquantized=float(np.exp(before.mean())),
        quantized=float(np.exp(after.mean())),
        cost=ratio - 1,
        standard_error=ratio * float(difference.std() / len(before) ** 0.5),
    )
