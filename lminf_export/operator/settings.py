"""The settings of Λ-attention and the chunk a step may bring."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lminf_export.errors import ConfigError, LminfError, shown

DEFAULT_NUM_SINK_TOKENS = 16
DEFAULT_CHUNK_SIZE = 256
# A longer training length is capped: the cost of every token grows with the window.
DEFAULT_WINDOW_CAP = 4096
# Four base-1024 digits: positions from here on have no exact rotation (docs/operator.md).
MAX_POSITION = 2**40
# What tensors and kernels count with.
MAX_INTEGER = 2**63 - 1
LambdaLayers = Literal["full", "all"]
LAMBDA_LAYERS: tuple[str, ...] = get_args(LambdaLayers)
DEFAULT_LAMBDA_LAYERS = LAMBDA_LAYERS[0]
RopeRegime = Literal["short", "long"]
ROPE_REGIMES: tuple[str, ...] = get_args(RopeRegime)
# Element types of weights, activations and caches.
Dtype = Literal["float32", "float16", "bfloat16"]
# Element types of rings that are not of the model's type.
KvCacheDtype = Literal["int8"]
# Stands for the element type of the export.
AUTO_KV_CACHE_DTYPE = "auto"
KV_CACHE_DTYPES: tuple[str, ...] = (AUTO_KV_CACHE_DTYPE, *get_args(KvCacheDtype))
_MINIMUM = {"window_size": 1, "num_sink_tokens": 0, "distance_limit": 1, "chunk_size": 1}


@dataclass(frozen=True)
class LambdaConfig:
    """Which keys a query sees, in which layers, and how many tokens one step may bring.

    Attributes:
        window_size: W ≥ 1, keys a query sees around itself, its own key included.
        num_sink_tokens: N ≥ 0, starting tokens that always stay visible.
        distance_limit: L ≥ W, the distance at which evicted starting tokens appear; default W.
        chunk_size: largest number S ≥ 1 of new tokens in one step; may exceed the window.
        lambda_layers: "full" gives sinks to layers that see everything by training; "all" also
            to sliding layers, within their own window.
        rope_regime: "short" or "long", the regime in which a rotary scaling that depends on the
            length of the text is frozen; None lets the window decide.

    Raises:
        ConfigError: naming the field, its value and the rule it breaks.

    Source: arXiv 2308.16137, section 3; docs/operator.md.
    """

    window_size: int
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS
    distance_limit: int = field(default=None)  # type: ignore[assignment]  # filled in below
    chunk_size: int = DEFAULT_CHUNK_SIZE
    lambda_layers: str = DEFAULT_LAMBDA_LAYERS
    rope_regime: str | None = None

    def __post_init__(self) -> None:
        if self.distance_limit is None:
            object.__setattr__(self, "distance_limit", self.window_size)
        for name, minimum in _MINIMUM.items():
            object.__setattr__(self, name, as_integer(name, getattr(self, name), minimum))
        if self.distance_limit < self.window_size:
            raise ConfigError(
                f"distance_limit={self.distance_limit}: must be at least window_size="
                f"{self.window_size}, or a starting token would look nearer than the window's edge"
            )
        for name in _MINIMUM:
            if getattr(self, name) > MAX_POSITION:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at most 2**40")
        require_one_of("lambda_layers", self.lambda_layers, LAMBDA_LAYERS)
        require_one_of("rope_regime", self.rope_regime, (None, *ROPE_REGIMES))

    @property
    def ring_capacity(self) -> int:
        """Slots C of a full ring: see `ring_capacity`."""
        return ring_capacity(self.window_size, self.chunk_size)

    def replace(self, **changes: Any) -> LambdaConfig:
        """Return a copy with some fields changed, validated again."""
        return replace(self, **changes)


def ring_capacity(window_size: int, chunk_size: int) -> int:
    """Return the slots C a ring needs so that a chunk may be written before it is attended.

    The oldest query of a chunk of S tokens needs W keys, the newest has already written
    S − 1 more: C ≥ W + S − 1, rounded up to whole chunks so that chunks of the full size
    never cross the ring's end.
    """
    return chunk_size * -(-(window_size + chunk_size - 1) // chunk_size)


def as_integer(
    name: str,
    value: object,
    minimum: int,
    error: type[LminfError] = ConfigError,
    *,
    maximum: int = MAX_INTEGER,
) -> int:
    """Return a value as an int if it is an integer in a range; numpy's count, bools do not.

    Raises:
        ConfigError: or another error asked for, naming the value and the rule.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # it says what it takes
    except TypeError:
        raise error(f"{name}={shown(value)}: must be an integer of at least {minimum}") from None
    if number < minimum:
        raise error(f"{name}={shown(number)}: must be at least {minimum}")
    if number > maximum:
        raise error(f"{name}={shown(number)}: must be at most {maximum}")
    return number


def as_number(name: str, value: object, error: type[LminfError] = ConfigError) -> float:
    """Return a value as a float if it is a finite real number; numpy's count, bools do not.

    Raises:
        ConfigError: or another error asked for, naming the value and the rule.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name}={shown(value)}: must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise error(f"{name}={shown(value)}: must be a finite number")
    return number


def require_one_of(
    name: str, value: object, allowed: Sequence[object], error: type[LminfError] = ConfigError
) -> None:
    """Check that an option has one of its values; None among them stands for "not given".

    Raises:
        ConfigError: or another error asked for, naming the option, its value and the values it
            may have.
    """
    # True == 1: a boolean is none of a few numbers. Other types may compare in ways of their own.
    is_plain = isinstance(value, str | numbers.Real | None) and not isinstance(value, bool)
    if not is_plain or value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed if choice is not None)
        raise error(f"{name}={shown(value)}: must be one of {choices}")
