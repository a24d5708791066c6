"""Negative log-likelihoods from logits, fast enough not to be seen beside the model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Elements worked on at a time: a few rows of logits and their exponentials stay in the cache.
BLOCK_ELEMENTS = 2**17


def negative_log_likelihood(
    logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return −log p of each target.

    Args:
        logits: (T, V), finite.
        targets: (T,) token ids.

    Returns:
        (T,) nats.
    """
    count, vocab_size = logits.shape
    result = np.empty(count, np.float32)
    rows = max(1, BLOCK_ELEMENTS // vocab_size)
    scratch = np.empty((min(rows, count), vocab_size), np.float32)
    for start in range(0, count, rows):
        block = logits[start : start + rows]
        top = block.max(-1, keepdims=True)
        work = scratch[: len(block)]
        np.subtract(block, top, out=work)
        np.exp(work, out=work)
        chosen = block[np.arange(len(block)), targets[start : start + rows]]
        result[start : start + rows] = np.log(work.sum(-1)) + (top[:, 0] - chosen)
    return result
