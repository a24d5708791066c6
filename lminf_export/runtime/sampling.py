"""Choosing the next token: the filters of transformers, in its order, in numpy.

Repetition penalty → temperature → top-k → top-p → min-p → draw. Temperature 0 is greedy.
"""

from __future__ import annotations

import math
import numbers
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lminf_export.errors import ConfigError
from lminf_export.operator.settings import as_integer

_FEW = 1024


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling; the defaults choose the likeliest token.

    Attributes:
        temperature: ≥ 0; divides the logits, 0 takes the largest.
        top_k: keep the k largest logits (ties with the last stay); 0 keeps all.
        top_p: in (0, 1]; keep the likeliest tokens until their probability reaches p.
        min_p: in [0, 1]; drop tokens less likely than p times the likeliest.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens
            seen in the prompt or the answer, as far back as the model's window.
        seed: ≥ 0 for a repeatable draw, None for a new one each time.

    Raises:
        ConfigError: naming the field, its value and the rule it breaks.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ConfigError(f"{name}={value!r}: must be a number")
        rules = (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, valid, rule in rules:
            if not valid or not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be {rule}")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if value is not None or name != "seed":
                object.__setattr__(self, name, as_integer(name, value, 0))


class Sampler:
    """Draws tokens of one stream.

    Args:
        config: how.
        vocab_size: V.
        memory: tokens the repetition penalty looks back.
    """

    def __init__(self, config: SamplingConfig, vocab_size: int, memory: int) -> None:
        self.config = config
        self._random = np.random.default_rng(config.seed)
        self._penalises = config.repetition_penalty != 1
        self._recent: deque[int] = deque(maxlen=memory)
        self._counts = np.zeros(vocab_size if self._penalises else 0, np.int64)

    def observe(self, token_ids: Iterable[int]) -> None:
        """Add tokens that the stream has seen; only the repetition penalty needs them."""
        if not self._penalises:
            return
        for token in token_ids:
            if len(self._recent) == self._recent.maxlen:
                self._counts[self._recent[0]] -= 1
            self._recent.append(token)
            self._counts[token] += 1

    def choose(self, logits: np.ndarray) -> int:
        """Choose a token.

        Args:
            logits: (V,) float32; not changed.
        """
        config = self.config
        if self._penalises:
            logits = penalised(logits, np.flatnonzero(self._counts), config.repetition_penalty)
        if config.temperature == 0:
            return int(np.argmax(logits))
        token_ids, probabilities = distribution(logits, config)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(token_ids[min(drawn, len(token_ids) - 1)])


def penalised(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Return logits (V,) with those of the seen ids made less likely."""
    changed = logits.copy()
    picked = changed[seen]
    changed[seen] = np.where(picked < 0, picked * penalty, picked / penalty)
    return changed


def distribution(logits: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits: (V,) after any penalty.
        config: temperature > 0.

    Returns:
        (M,) ids kept, and their (M,) float64 probabilities, which sum to one.
    """
    token_ids = np.arange(len(logits))
    if 0 < config.top_k < len(logits):
        token_ids = _top_k(logits, config.top_k)
        logits = logits[token_ids]
    # Subtracting the largest first keeps tiny temperatures finite.
    scaled = (logits.astype(np.float64) - logits.max()) / config.temperature
    if config.top_p < 1:
        kept = _top_p(scaled, config.top_p)
        token_ids, scaled = token_ids[kept], scaled[kept]
    if config.min_p > 0:
        kept = np.flatnonzero(np.exp(scaled) >= config.min_p)
        token_ids, scaled = token_ids[kept], scaled[kept]
    return token_ids, _softmax(scaled)


def _top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Return the ids of the k largest, and of those equal to the last of them."""
    return np.flatnonzero(values >= np.partition(values, -k)[-k])


def _top_p(scaled: np.ndarray, p: float) -> np.ndarray:
    """Indices of the smallest set of likeliest tokens that reaches p, never empty."""
    probabilities = _softmax(scaled)
    # Few tokens reach p, nearly always: sorting a whole vocabulary takes longer than a layer.
    candidates = _top_k(scaled, _FEW) if len(scaled) > _FEW else np.arange(len(scaled))
    if probabilities[candidates].sum() < p:
        candidates = np.arange(len(scaled))
    order = candidates[np.argsort(-scaled[candidates], kind="stable")]
    before = np.cumsum(probabilities[order])
    count = int(np.searchsorted(before, p, side="left")) + 1
    return np.sort(order[:count])


def _softmax(scaled: np.ndarray) -> np.ndarray:
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()
