"""Choosing the next token: the filters of transformers, in its order, in numpy.

Repetition penalty → temperature → top-k → top-p → min-p → draw. Temperature 0 is greedy.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lminf_export.errors import ConfigError, InputError
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.drawing import Drawing

_FEW = 1024
_NO_TOKEN = (
    "no token can be chosen: a logit is not a number, or none is finite; the model's weights are "
    "damaged, or what masks its logits leaves nothing"
)


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

    @property
    def inverse_temperature(self) -> float:
        """1 / temperature, finite."""
        return min(1 / self.temperature, sys.float_info.max)

    @property
    def least_exponent(self) -> float:
        """The exponent of the least weight that min-p keeps; the likeliest token's is 0."""
        return math.log(self.min_p) if self.min_p > 0 else -math.inf


class Sampler:
    """Draws tokens of one stream.

    Args:
        config: how.
        vocab_size: V.
        memory: tokens the repetition penalty looks back.
        drawing: of the kernel library; draws the same tokens, faster.
    """

    def __init__(
        self,
        config: SamplingConfig,
        vocab_size: int,
        memory: int,
        drawing: Drawing | None = None,
    ) -> None:
        self.config = config
        self._random = np.random.default_rng(config.seed)
        self._drawing = drawing
        self._seen = SeenTokens(memory, vocab_size) if config.repetition_penalty != 1 else None

    def observe(self, token_ids: Iterable[int]) -> None:
        """Add tokens that the stream has seen; only the repetition penalty needs them."""
        if self._seen is not None:
            self._seen.add(token_ids)

    def choose(self, logits: np.ndarray) -> int:
        """Choose a token.

        Args:
            logits: (V,) float32; as they were when this returns.

        Raises:
            InputError: a logit is not a number, or no token is possible.
        """
        if self._seen is None:
            return self._drawn(logits)
        seen, penalty = self._seen.ids, self.config.repetition_penalty
        if not logits.flags.writeable:
            return self._drawn(penalised(logits, seen, penalty))
        # A copy of a large vocabulary would take longer than the draw.
        before = logits[seen]
        logits[seen] = _less_likely(before, penalty)
        try:
            return self._drawn(logits)
        finally:
            logits[seen] = before

    def _drawn(self, logits: np.ndarray) -> int:
        config = self.config
        if config.temperature == 0:
            token = int(logits.argmax())
            if not logits[token] > -math.inf:
                raise InputError(_NO_TOKEN)
            return token
        uniform = self._random.random()
        if self._drawing is not None and self._drawing.takes(logits):
            found = self._drawing.token(
                logits,
                inverse_temperature=config.inverse_temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                least_exponent=config.least_exponent,
                uniform=uniform,
            )
            if found is None:
                raise InputError(_NO_TOKEN)
            return found
        if not math.isfinite(logits.max()):
            raise InputError(_NO_TOKEN)
        token_ids, probabilities = distribution(logits, config)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
        return int(token_ids[min(drawn, len(token_ids) - 1)])


class SeenTokens:
    """The different tokens among the last ones.

    Args:
        memory: how many tokens are the last ones.
        vocab_size: V.
    """

    def __init__(self, memory: int, vocab_size: int) -> None:
        self._recent: deque[int] = deque(maxlen=memory)
        self._counts: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._ids = np.zeros(min(memory, vocab_size), np.int64)

    @property
    def ids(self) -> np.ndarray:
        """Ids (M,), each once, in no order; valid until the next `add`."""
        return self._ids[: len(self._places)]

    def add(self, token_ids: Iterable[int]) -> None:
        """Add tokens; the oldest are forgotten."""
        for token in token_ids:
            if len(self._recent) == self._recent.maxlen:
                self._forget(self._recent[0])
            self._recent.append(token)
            count = self._counts.get(token, 0)
            self._counts[token] = count + 1
            if count == 0:
                place = self._places[token] = len(self._places)
                self._ids[place] = token

    def _forget(self, token: int) -> None:
        self._counts[token] -= 1
        if self._counts[token] > 0:
            return
        del self._counts[token]
        # The last one takes its place.
        place, last = self._places.pop(token), int(self._ids[len(self._places)])
        if last != token:
            self._ids[place], self._places[last] = last, place


def penalised(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Return logits (V,) with those of the seen ids made less likely."""
    changed = logits.copy()
    changed[seen] = _less_likely(changed[seen], penalty)
    return changed


def _less_likely(logits: np.ndarray, penalty: float) -> np.ndarray:
    return np.where(logits < 0, logits * penalty, logits / penalty)


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
    with np.errstate(over="ignore"):  # what is so far below the largest has no weight
        scaled = (logits.astype(np.float64) - logits.max()) * config.inverse_temperature
    weights = np.exp(scaled)
    kept = np.ones(len(weights), bool)
    if config.top_p < 1:
        kept = _top_p(logits, weights, config.top_p)
    if config.min_p > 0:
        kept &= scaled >= config.least_exponent
    weights = weights[kept]
    return token_ids[kept], weights / weights.sum()


def _top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Return the ids of the k largest, and of those equal to the last of them."""
    return np.flatnonzero(values >= np.partition(values, -k)[-k])


def _top_p(logits: np.ndarray, weights: np.ndarray, p: float) -> np.ndarray:
    """Tell which are in the smallest set of likeliest tokens that reaches p, never empty."""
    # Few tokens reach p, nearly always: sorting a whole vocabulary takes longer than a layer.
    target = p * weights.sum()
    candidates = _top_k(logits, _FEW) if len(logits) > _FEW else np.arange(len(logits))
    if weights[candidates].sum() < target:
        candidates = np.arange(len(logits))
    order = candidates[np.argsort(-logits[candidates], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), target, side="left")) + 1
    kept = np.zeros(len(logits), bool)
    kept[order[:count]] = True
    return kept
