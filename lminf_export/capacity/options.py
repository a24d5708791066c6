"""The questions of a capacity plan: who asks how often, and how fast a replica is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lminf_export.errors import ConfigError, shown
from lminf_export.operator.settings import MAX_INTEGER, as_integer, as_number
from lminf_export.runtime.batching.engine import MOST_SLOTS
from lminf_export.serve.settings import ServeSettings

# Beyond all servers and sessions, and far from the ends of floating point.
_LEAST, _MOST = 1e-9, 1e15
# Where a speed comes from.
SOURCES = ("given", "measured")


@dataclass(frozen=True)
class SessionActivity:
    """How active a session is, and how long it may wait.

    Attributes:
        answers_per_hour: of one session, on average over all of them.
        answer_tokens: of one answer.
        prompt_tokens: new ones of one question: a parked session has read the rest.
        wait_seconds: longest wait for a slot, but for one answer in a hundred.

    Raises:
        ConfigError: naming the field and its rule.
    """

    answers_per_hour: float = 12.0
    answer_tokens: float = 256.0
    prompt_tokens: float = 64.0
    wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            is_zero_allowed = field.name in ("prompt_tokens", "wait_seconds")
            _set_number(self, field.name, is_zero_allowed=is_zero_allowed)


@dataclass(frozen=True)
class ReplicaSpeed:
    """How fast one server runs with all its slots busy.

    Attributes:
        tokens_per_second: new tokens of all slots together.
        prompt_tokens_per_second: tokens of prompts read; None where they cost nothing beside
            the rest.
        source: "given" or "measured".

    Raises:
        ConfigError: naming the field and its rule.
    """

    tokens_per_second: float
    prompt_tokens_per_second: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        _set_number(self, "tokens_per_second")
        if self.prompt_tokens_per_second is not None:
            _set_number(self, "prompt_tokens_per_second")
        if self.source not in SOURCES:
            raise ConfigError(f"source={shown(self.source)}: must be one of {', '.join(SOURCES)}")

    def seconds(self, activity: SessionActivity) -> float:
        """Return the time of the engine that one answer takes, when all slots are busy."""
        written = activity.answer_tokens / self.tokens_per_second
        if self.prompt_tokens_per_second is None:
            return written
        return written + activity.prompt_tokens / self.prompt_tokens_per_second


@dataclass(frozen=True)
class CapacityOptions:
    """Settings of the servers that are planned; the same fields are options of `lminf capacity`.

    Attributes:
        slots: of a server, 4,096 at most.
        max_waiting: sequences that may wait for a slot of a server; one that has had its turn waits
            with its state.
        session_bytes: memory of its kept conversations.
        prefix_reuse: whether it keeps states that prompts begin with, as much as its slots.
        memory: bytes that a server may take; None asks for what it needs.
        reserve_bytes: memory besides weights, slots and kept states: interpreter and libraries.
        bandwidth_gbits: of the network between a server and a shared store, 10⁹ bits a second.
        sessions: of all users; None plans one server.
        tokens: lengths of sessions whose sizes are shown, tokens read; the window, where a state is
            full, and a million by default.

    Raises:
        ConfigError: naming the field and its rule.
    """

    slots: int = ServeSettings.slots
    max_waiting: int = ServeSettings.max_waiting
    session_bytes: int = ServeSettings.session_bytes
    prefix_reuse: bool = ServeSettings.prefix_reuse
    memory: int | None = None
    reserve_bytes: int = 1 << 29
    bandwidth_gbits: float = 10.0
    sessions: int | None = None
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _set_integer(self, "slots", 1, maximum=MOST_SLOTS)
        if not isinstance(self.prefix_reuse, bool):
            raise ConfigError(f"prefix_reuse={shown(self.prefix_reuse)}: must be True or False")
        for name in ("max_waiting", "session_bytes", "reserve_bytes"):
            _set_integer(self, name, 0)
        for name in ("memory", "sessions"):
            if getattr(self, name) is not None:
                _set_integer(self, name, 1)
        _set_number(self, "bandwidth_gbits")
        if not isinstance(self.tokens, (tuple, list)):
            raise ConfigError(f"tokens={shown(self.tokens)}: must be a tuple of integers")
        lengths = tuple(as_integer("tokens", count, 1) for count in self.tokens)
        object.__setattr__(self, "tokens", lengths)


def _set_integer(holder: object, name: str, least: int, *, maximum: int = MAX_INTEGER) -> None:
    """Check a field, and make it an int that JSON holds, whatever type it came in."""
    found = as_integer(name, getattr(holder, name), least, maximum=maximum)
    object.__setattr__(holder, name, found)


def _set_number(holder: object, name: str, *, is_zero_allowed: bool = False) -> None:
    """Check a field, and make it a number that JSON holds; an int stays one."""
    value = getattr(holder, name)
    number = as_number(name, value)
    if not isinstance(value, int):
        object.__setattr__(holder, name, number)
    if number < 0 or (number == 0 and not is_zero_allowed):
        least = "at least 0" if is_zero_allowed else "above 0"
        raise ConfigError(f"{name}={shown(value)}: must be {least}")
    if number and not _LEAST <= number <= _MOST:
        raise ConfigError(f"{name}={shown(value)}: must be {_LEAST:g} … {_MOST:g}")
