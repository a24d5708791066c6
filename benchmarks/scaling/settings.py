"""Settings of a simulated fleet: times that were measured, and what is assumed."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Times:
    """Times of one server, seconds.

    Attributes:
        step: of decoding, by the number of streams − 1.
        chunk: tokens that one turn of the engine reads of a prompt at most.
        piece: (least, per token) of reading a piece: a line through two measured lengths.
        start: from the start of a process to its first token.
        restore: a full-grown state into a slot, and out of it.
        save: the same to a store's disk, sealed, without the network.
        load: the same back, checked.
    """

    step: tuple[float, ...]
    chunk: int
    piece: tuple[float, float]
    start: float
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
        slots: of a server.
        max_waiting: turns that may wait on a server; more are refused.
        session_bytes: of a server's memory for conversations.
        answers_per_hour: of a session, on average over all of them.
        zipf_exponent, zipf_shift: the weight of the session of rank r is (r + shift)^-exponent.
        answer_tokens, prompt_tokens: means of geometric lengths.
        history_median, history_sigma: tokens read before, log-normal.
        seconds: of arrivals that count; `warm_up` seconds come before.
        load_bound: a server takes a turn of another one's only below this many times the mean.
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


def measured(path: Path) -> tuple[Times, Sizes, dict[str, Any]]:
    """Read what `benchmarks.scaling.parameters` wrote; return it whole, too.

    Raises:
        InputError: the file is none of these.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return *_measured(found), found
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{path} is no result of benchmarks.scaling.parameters") from None


def _measured(found: dict[str, Any]) -> tuple[Times, Sizes]:
    full = found["states"][-1]
    if full["tokens"] < found["full_at"]:
        raise ValueError("its states are not full")
    chunk = found["bundle"]["lambda_config"]["chunk_size"]
    lengths = sorted(map(int, found["prompt_ms"]))
    (short, long), (low, high) = (
        (lengths[0], lengths[-1]),
        (found["prompt_ms"][str(size)] / 1e3 for size in (lengths[0], lengths[-1])),
    )
    each = (high - low) / (long - short)
    times = Times(
        step=tuple(ms / 1e3 for _, ms in sorted((int(b), x) for b, x in found["step_ms"].items())),
        chunk=chunk,
        piece=(low - each * short, each),
        start=found["start_seconds"],
        restore=(full["snapshot_ms"] + full["restore_ms"]) / 1e3,
        save=full["save_ms"] / 1e3,
        load=full["load_ms"] / 1e3,
    )
    sizes = Sizes(found["kept_bytes"], full["stored_bytes"], found["full_cache_bytes_per_token"])
    return times, sizes
