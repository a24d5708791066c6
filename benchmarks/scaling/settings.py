"""Settings of a simulated fleet: times that were measured, and what is assumed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lminf_export.errors import ConfigError, InputError
from lminf_export.operator.settings import as_integer, as_number

# What becomes of a conversation whose state is not in the memory of the server it comes to.
Elsewhere = Literal["store", "reread"]
# What a session is: a state of bounded size, or a full cache that grows with every token.
Cache = Literal["bounded", "full"]
# Which server a turn of a conversation goes to.
Routing = Literal["hash", "random"]

_ZERO_ALLOWED = {
    *("max_waiting", "session_bytes", "zipf_exponent", "zipf_shift", "history_sigma", "warm_up"),
    *("store_latency", "noticed", "recovery", "drain_share", "drain_grace", "seed"),
}
# Beyond these the numbers that are drawn are none any more, or all the same.
_RANGES = {
    "zipf_exponent": (0.0, 10.0),
    "answer_tokens": (1.0, 1e9),
    "prompt_tokens": (1.0, 1e9),
    "history_median": (1.0, 1e9),
    "history_sigma": (0.0, 5.0),
    "drain_share": (0.0, 1.0),
    "bandwidth": (1e3, 1e15),
}


@dataclass(frozen=True)
class Times:
    """Times of one server, seconds.

    Attributes:
        step: of decoding, by the number of streams − 1.
        chunk: tokens that one turn of the engine reads of a prompt at most.
        piece: (least, per token) of reading a piece: a line through two measured lengths.
        start: from the start of a process to its first token.
        snapshot: of a full-grown state, out of a slot.
        restore: the same into a slot.
        save: the same to a store's disk, sealed, without the network.
        load: the same back, checked.
    """

    step: tuple[float, ...]
    chunk: int
    piece: tuple[float, float]
    start: float
    snapshot: float
    restore: float
    save: float
    load: float

    def piece_seconds(self, tokens: int) -> float:
        """Return the time of reading one piece of a prompt."""
        least, each = self.piece
        return least + each * tokens


@dataclass(frozen=True)
class Sizes:
    """Bytes of sessions.

    Attributes:
        kept: of a full-grown one in a server's memory.
        stored: of the same in a store.
        full_per_token: by which a full cache grows with each token.
    """

    kept: int
    stored: int
    full_per_token: int


@dataclass(frozen=True)
class FleetSettings:
    """Everything about a run that is not measured; defaults are the committed run's.

    Attributes:
        sessions: that there are, all of them begun before.
        hosts: servers, each with a home in the ring of `ring_points` places.
        slots: of a server; steps of so many streams must have been measured.
        max_waiting: turns that may wait on a server; more are refused.
        session_bytes: of a server's memory for conversations.
        answers_per_hour: of a session, on average over all of them.
        zipf_exponent, zipf_shift: the weight of the session of rank r is (r + shift)^-exponent.
        answer_tokens, prompt_tokens: means of geometric lengths.
        history_median, history_sigma: tokens read before, log-normal.
        seconds: of arrivals that count; `warm_up` seconds come before.
        load_bound: a server takes a turn while it has fewer than this many times the mean, or than
            slots where those are more.
        bandwidth: bits per second of a server's network.
        store_latency: seconds of one request to the store.
        lifetime: mean seconds until a server fails; None: none does.
        noticed: seconds until a failed server's turns are sent elsewhere.
        recovery: seconds until a failed server is back, its start aside.
        drain_share: of the servers that are replaced at a time, one group after another; 0: none.
        drain_grace: seconds in which a server that is replaced finishes its answers.
        elsewhere, routing, cache: see there.
        seed: of all random numbers.

    Raises:
        ConfigError: naming the field and its rule.
    """

    sessions: int = 1_000_000
    hosts: int = 1_000
    slots: int = 8
    max_waiting: int = 256
    session_bytes: int = 1 << 30
    ring_points: int = 100
    answers_per_hour: float = 3.0
    zipf_exponent: float = 1.0
    zipf_shift: int = 5_000
    answer_tokens: float = 2_048.0
    prompt_tokens: float = 64.0
    history_median: float = 8_192.0
    history_sigma: float = 1.0
    seconds: float = 3_600.0
    warm_up: float = 300.0
    load_bound: float = 1.25
    bandwidth: float = 10e9
    store_latency: float = 0.002
    lifetime: float | None = 72_000.0
    noticed: float = 10.0
    recovery: float = 120.0
    drain_share: float = 0.05
    drain_grace: float = 30.0
    elsewhere: Elsewhere = "store"
    routing: Routing = "hash"
    cache: Cache = "bounded"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                as_integer(field.name, value, 0 if field.name in _ZERO_ALLOWED else 1)
            elif str(field.type).startswith("float") and value is not None:
                number, is_zero_allowed = as_number(field.name, value), field.name in _ZERO_ALLOWED
                if number < 0 or (number == 0 and not is_zero_allowed):
                    bound = "0 at least" if is_zero_allowed else "above 0"
                    raise ConfigError(f"{field.name}={value}: must be {bound}")
                least, most = _RANGES.get(field.name, (0.0, math.inf))
                if not least <= number <= most:
                    raise ConfigError(f"{field.name}={value}: must be {least:g} … {most:g}")


def measured(path: Path) -> tuple[Times, Sizes, dict[str, Any]]:
    """Read what `benchmarks.scaling.parameters` wrote; return it whole, too.

    Raises:
        InputError: the file is none of these, or a number in it is none that can be measured.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return *_measured(found), found
    except (ValueError, TypeError) as error:
        why = str(error)
    except KeyError as error:
        why = f"{error} is not there"
    raise InputError(f"{path} is no result of benchmarks.scaling.parameters: {why}")


def _measured(found: dict[str, Any]) -> tuple[Times, Sizes]:
    for part, name in (("environment", "device"), ("bundle", "model")):
        found[part][name]  # what the simulation's result says of them
    full = (found["states"] or [{}])[-1]
    if _positive(full, "tokens") < _positive(found, "full_at"):
        raise ValueError("its states are not full")
    times = Times(
        step=_steps(found["step_ms"]),
        chunk=as_integer("chunk_size", found["bundle"]["lambda_config"]["chunk_size"], 1),
        piece=_piece(found["prompt_ms"]),
        start=_positive(found, "start_seconds"),
        snapshot=_positive(full, "snapshot_ms") / 1e3,
        restore=_positive(full, "restore_ms") / 1e3,
        save=_positive(full, "save_ms") / 1e3,
        load=_positive(full, "load_ms") / 1e3,
    )
    sizes = Sizes(
        as_integer("kept_bytes", found["kept_bytes"], 1),
        as_integer("stored_bytes", full["stored_bytes"], 1),
        as_integer("full_cache_bytes_per_token", found["full_cache_bytes_per_token"], 1),
    )
    return times, sizes


def _steps(step_ms: dict[str, Any]) -> tuple[float, ...]:
    """Return the seconds of steps of 1 … n streams."""
    counts = [str(count) for count in range(1, len(step_ms) + 1)]
    if not counts or step_ms.keys() != {*counts}:
        raise ValueError(
            f"step_ms has {', '.join(step_ms) or 'nothing'}, not each of 1 … n streams"
        )
    return tuple(_positive(step_ms, count, "step_ms ") / 1e3 for count in counts)


def _piece(prompt_ms: dict[str, Any]) -> tuple[float, float]:
    """Return the line through the shortest and the longest prompt, seconds."""
    short, *_, long = sorted(map(int, prompt_ms)) if len(prompt_ms) > 1 else (1, 1)
    if short == long:
        raise ValueError("prompt_ms has fewer than two lengths")
    low, high = (_positive(prompt_ms, str(length), "prompt_ms ") / 1e3 for length in (short, long))
    each = (high - low) / (long - short)
    least = low - each * short
    if each <= 0 or least + each <= 0:
        raise ValueError("prompt_ms: the line through its ends is not above 0 for every length")
    return least, each


def _positive(table: dict[str, Any], name: str, of: str = "") -> float:
    number = as_number(of + name, table[name])
    if number <= 0:
        raise ValueError(f"{of}{name}={number}: must be above 0")
    return number
