"""The three numbers of Λ-attention and the chunk a step may bring."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from lminf_export.errors import ConfigError

DEFAULT_NUM_SINK_TOKENS = 16
DEFAULT_CHUNK_SIZE = 256
# A longer training length is capped: the cost of every token grows with the window.
DEFAULT_WINDOW_CAP = 4096
# Four base-1024 digits: positions from here on have no exact rotation (docs/operator.md).
MAX_POSITION = 2**40


@dataclass(frozen=True)
class LambdaConfig:
    """Which keys a query sees, and how many tokens one step may bring.

    Attributes:
        window_size: W ≥ 1, keys a query sees around itself, its own key included.
        num_sink_tokens: N ≥ 0, tokens at the very start that stay visible for ever.
        distance_limit: L ≥ W, the distance at which evicted starting tokens appear; default W.
        chunk_size: largest number S ≥ 1 of new tokens in one step; may exceed the window.

    Raises:
        ConfigError: naming the field, its value and the rule it breaks.

    Source: arXiv 2308.16137, section 3; docs/operator.md.
    """

    window_size: int
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS
    distance_limit: int = field(default=None)  # type: ignore[assignment]  # filled in below
    chunk_size: int = DEFAULT_CHUNK_SIZE

    def __post_init__(self) -> None:
        if self.distance_limit is None:
            object.__setattr__(self, "distance_limit", self.window_size)
        for item in fields(self):
            _require_integer(item.name, getattr(self, item.name))
        _require_at_least("window_size", self.window_size, 1)
        _require_at_least("num_sink_tokens", self.num_sink_tokens, 0)
        _require_at_least("chunk_size", self.chunk_size, 1)
        if self.distance_limit < self.window_size:
            raise ConfigError(
                f"distance_limit={self.distance_limit}: must be at least window_size="
                f"{self.window_size}, or a starting token would look nearer than the window's edge"
            )
        for item in fields(self):
            if getattr(self, item.name) > MAX_POSITION:
                raise ConfigError(f"{item.name}={getattr(self, item.name)}: must be at most 2**40")

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


def _require_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r}: must be an integer")


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{name}={value}: must be at least {minimum}")
