"""Choosing the next token: the filters of transformers, in its order, in numpy.

Repetition penalty → frequency and presence penalty → bias → temperature → top-k → top-p → min-p →
draw. Temperature 0 is greedy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lminf_export.errors import ConfigError, InputError, shown
from lminf_export.operator.settings import as_integer, as_number
from lminf_export.runtime.drawing import Drawing
from lminf_export.runtime.inputs import listed_ids
from lminf_export.runtime.logprobs import logprobs_of
from lminf_export.runtime.penalties import (
    CountedTokens,
    Edit,
    bias,
    count_penalty,
    edited,
    repetition_penalty,
)

__all__ = ["Sampler", "SamplingConfig", "distribution", "logprobs_of"]

_FEW = 1024
_LOGIT_TYPES = (np.float32, np.float64)
# NumPy's generators take any; a hash of 128 bits is one.
_MAX_SEED = 2**128 - 1
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
        repetition_penalty: 1e-9 … 1e9; divides positive and multiplies negative logits of tokens
            seen in the prompt or the answer, as far back as the model's window.
        seed: ≥ 0 for a repeatable draw, None for a new one each time.
        presence_penalty: −2 … 2; taken once from the logit of each token that the answer has,
            as far back as the model's window; the prompt does not count.
        frequency_penalty: −2 … 2; taken from such a logit as often as the answer has the token
            there.
        logit_bias: −100 … 100 by token id, added to the logits after the penalties; given as a
            mapping, held as a tuple of pairs (id, bias) in the order of the ids.

    Raises:
        ConfigError: naming the field, its value and the rule it breaks.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = ()

    def __post_init__(self) -> None:
        rules: dict[str, tuple[Callable[[float], bool], str]] = {
            "temperature": (lambda x: x >= 0, "at least 0"),
            "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "between 0 and 1"),
            "repetition_penalty": (lambda x: 1e-9 <= x <= 1e9, "between 1e-9 and 1e9"),
            "presence_penalty": (lambda x: -2 <= x <= 2, "between -2 and 2"),
            "frequency_penalty": (lambda x: -2 <= x <= 2, "between -2 and 2"),
        }
        for name, (is_valid, rule) in rules.items():
            value = getattr(self, name)
            number = as_number(name, value)
            if not is_valid(number):
                raise ConfigError(f"{name}={shown(value)}: must be {rule}")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "top_k", as_integer("top_k", self.top_k, 0))
        if self.seed is not None:
            object.__setattr__(self, "seed", as_integer("seed", self.seed, 0, maximum=_MAX_SEED))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is held."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is always that of the model's largest logit."""
        return self.temperature == 0 and not self.edits_logits

    @property
    def edits_logits(self) -> bool:
        """Whether a penalty or a bias changes logits."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or any(penalties) or bool(self.logit_bias)

    @property
    def inverse_temperature(self) -> float:
        """1 / temperature, finite."""
        return min(1 / self.temperature, sys.float_info.max)

    @property
    def least_exponent(self) -> float:
        """The exponent of the least weight that min-p keeps; the likeliest token's is 0."""
        return math.log(self.min_p) if self.min_p > 0 else -math.inf


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, tuple) or not all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in value
    ):
        raise ConfigError(f"logit_bias={shown(value)}: must be a mapping of token ids to biases")
    found: dict[int, float] = {}
    for key, amount in value:
        token = as_integer("logit_bias: token id", key, 0)
        found[token] = as_number(f"logit_bias of token {token}", amount)
        if not -100 <= found[token] <= 100:
            raise ConfigError(
                f"logit_bias of token {token}={shown(amount)}: must be between -100 and 100"
            )
    return tuple(sorted(found.items()))


class Sampler:
    """Draws tokens of one stream.

    Args:
        config: how.
        vocab_size: V.
        memory: tokens the penalties look back.
        drawing: of the kernel library; draws the same tokens, faster.

    Raises:
        ConfigError: a bias of a token that is not in the vocabulary.
        InputError: no vocabulary, no memory, or no SamplingConfig.
    """

    def __init__(
        self,
        config: SamplingConfig,
        vocab_size: int,
        memory: int,
        drawing: Drawing | None = None,
    ) -> None:
        if not isinstance(config, SamplingConfig):
            raise InputError(f"{shown(config)} is no SamplingConfig")
        self.config = config
        self._vocab_size = as_integer("vocab_size", vocab_size, 1, InputError)
        memory = as_integer("memory", memory, 1, InputError)
        self._random = np.random.default_rng(config.seed)
        self._drawing = drawing
        self._seen = self._written = None
        if config.repetition_penalty != 1:
            self._seen = CountedTokens(memory, self._vocab_size)
        if config.presence_penalty or config.frequency_penalty:
            self._written = CountedTokens(memory, self._vocab_size)
        self._chosen: int | None = None
        self._bias = self._edit_of_biases(config.biases)

    def _edit_of_biases(self, biases: tuple[tuple[int, float], ...]) -> list[Edit]:
        if not biases:
            return []
        if biases[-1][0] >= self._vocab_size:
            raise ConfigError(
                f"logit_bias of token {biases[-1][0]}: the vocabulary is 0 … {self._vocab_size - 1}"
            )
        ids, amounts = zip(*biases, strict=True)
        return [(np.array(ids, np.int64), bias(np.array(amounts)))]

    def observe(self, token_ids: Iterable[int]) -> None:
        """Add tokens that the stream has read; only penalties need them.

        A token is written by the answer if it is the first one observed after the `choose` that
        returned it. All others are the prompt's: the repetition penalty is about both,
        the presence and the frequency penalty are about those written.

        Args:
            token_ids: at most as many as memory holds count.

        Raises:
            InputError: an id outside the vocabulary, or no integer.
        """
        if self._seen is None and self._written is None:
            return
        ids = listed_ids(token_ids, "token_ids", self._vocab_size)
        if self._seen is not None:
            self._seen.add(ids)
        if self._written is not None and ids and ids[0] == self._chosen:
            self._written.add(ids[:1])
        if ids:
            self._chosen = None

    def choose(self, logits: np.ndarray) -> int:
        """Choose a token.

        Args:
            logits: (V,) float32; as they were when this returns.

        Raises:
            InputError: a logit is not a number, no token is possible, or another shape or type.
        """
        if (
            not isinstance(logits, np.ndarray)
            or logits.shape != (self._vocab_size,)
            or logits.dtype not in _LOGIT_TYPES
        ):
            raise InputError(f"logits must be an array ({self._vocab_size},) of floats")
        edits = self._edits()
        if edits:
            with edited(logits, edits) as changed:
                token = self._drawn(changed)
        else:
            token = self._drawn(logits)
        self._chosen = token
        return token

    def _edits(self) -> list[Edit]:
        config, edits = self.config, []
        if self._seen is not None:
            edits.append((self._seen.ids, repetition_penalty(config.repetition_penalty)))
        if self._written is not None:
            ids, counts = self._written.ids, self._written.counts
            change = count_penalty(config.frequency_penalty, config.presence_penalty, counts)
            edits.append((ids, change))
        return edits + self._bias

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
