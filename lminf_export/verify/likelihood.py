"""Negative log-likelihoods from logits, in blocks that fit the processor's cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# Elements computed at a time: a few rows of logits and their exponentials.
BLOCK_ELEMENTS = 2**17


def negative_log_likelihood(
    logits: NDArray[np.floating[Any]],
    targets: NDArray[np.int64],
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """Return −log p of each target.

    Args:
        logits: (T, V), finite.
        targets: (T,) token ids.
        dtype: in which it is computed: float32 for speed, float64 to compare two models whose
            likelihoods are nearly equal.

    Returns:
        (T,) nats in dtype.
    """
    count, vocab_size = logits.shape
    result = np.empty(count, dtype)
    rows = max(1, BLOCK_ELEMENTS // vocab_size)
    scratch = np.empty((min(rows, count), vocab_size), dtype)
    for start in range(0, count, rows):
        block = logits[start : start + rows]
        top = block.max(-1, keepdims=True)
        work = scratch[: len(block)]
        np.subtract(block, top, out=work, dtype=work.dtype)
        np.exp(work, out=work)
        chosen = block[np.arange(len(block)), targets[start : start + rows]]
        distance = np.subtract(top[:, 0], chosen, dtype=work.dtype)
        result[start : start + rows] = np.log(work.sum(-1)) + distance
    return result
