"""Log probabilities of tokens under a model's own logits."""

from __future__ import annotations

import math

import numpy as np

from lminf_export.errors import InputError
from lminf_export.operator.settings import as_integer

# Converted to float64 in parts that stay in a core's cache.
_PART = 16_384
# Fewer logits than this are sorted as they are.
_FEW = 4096
_BLOCKS = 512


def logprobs_of(
    logits: np.ndarray, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log probability of a token, and of the likeliest ones.

    Args:
        logits: (V,) float32, the model's own: before penalties, biases, temperature and filters.
        token: 0 … V − 1.
        count: how many of the likeliest tokens to return, at most V; 0 for none.

    Returns:
        Natural logarithm of the token's probability, and the likeliest tokens as (id, log
        probability), best first; of equal ones the smaller id comes first.

    Raises:
        InputError: a logit is not finite, or the arguments are of another shape, type or range.
    """
    if not isinstance(logits, np.ndarray) or logits.ndim != 1 or logits.dtype.kind != "f":
        raise InputError("logits must be an array (V,) of floats")
    token = as_integer("token", token, 0, InputError)
    count = as_integer("count", count, 0, InputError)
    if token >= len(logits):
        raise InputError(f"token={token}: there are logits of 0 … {len(logits) - 1}")
    largest = float(logits.max())
    # The sum is finite only if its terms are; of huge ones it may be infinite all the same.
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = math.isfinite(logits.sum()) or bool(np.isfinite(logits).all())
    if not is_finite:
        raise InputError("a logit is not finite: there are no log probabilities")
    total = 0.0
    for start in range(0, len(logits), _PART):
        part = logits[start : start + _PART].astype(np.float64)
        part -= largest
        total += float(np.exp(part, out=part).sum())
    # Huge logits must lose the largest before anything small is taken from them.
    logarithm = math.log(total)
    top = _likeliest(logits, min(count, len(logits))).tolist()
    return float(logits[token]) - largest - logarithm, tuple(
        (index, float(logits[index]) - largest - logarithm) for index in top
    )


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the largest logits, best first, of equal ones the smaller id first."""
    if count == 0:
        return np.zeros(0, np.int64)
    candidates = np.arange(len(logits))
    if len(logits) > _FEW and count <= _BLOCKS:
        # That many blocks have a logit as large as this: all that are wanted are.
        width = len(logits) // _BLOCKS
        maxima = logits[: width * _BLOCKS].reshape(_BLOCKS, width).max(axis=1)
        candidates = np.flatnonzero(logits >= np.partition(maxima, -count)[-count])
    values = logits[candidates]
    if len(candidates) > count:
        last = np.partition(values, -count)[-count]
        above = np.flatnonzero(values > last)
        equal = np.flatnonzero(values == last)[: count - len(above)]
        chosen = np.sort(np.concatenate((above, equal)))
        candidates, values = candidates[chosen], values[chosen]
    return candidates[np.argsort(-values, kind="stable")]
