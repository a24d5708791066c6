"""The result of `plan_capacity`, in records that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lminf_export.capacity.options import CapacityOptions, ReplicaSpeed, SessionActivity


@dataclass(frozen=True)
class SessionSize:
    """A session that has read so many tokens.

    Attributes:
        tokens: read.
        state_bytes: of its state, as a snapshot in memory.
        stored_bytes: of its file or object in a store, at most.
        per_gib_memory: sessions that a GiB of `--session-bytes` keeps.
        per_gib_store: sessions in a GiB of a store.
        move_ms: time to move it over the network, milliseconds.
        full_cache_bytes: of the unmodified model's cache for as many tokens.
    """

    tokens: int
    state_bytes: int
    stored_bytes: int
    per_gib_memory: int
    per_gib_store: int
    move_ms: float
    full_cache_bytes: int


@dataclass(frozen=True)
class ServerMemory:
    """Memory of a server, in bytes.

    Attributes:
        weights: of the bundle's weights, mapped or copied.
        slots: caches of all slots.
        spare: one slot's, for rows that change places.
        waiting: states of sequences that had a slot and wait for their next turn, at most.
        prefixes: states that prompts begin with, at most.
        sessions: kept conversations, at most.
        reserve: everything else, as given.
        total: their sum.
        sessions_kept: full-grown conversations in `sessions`.
        slots_that_fit: in the memory given, with the rest as it is, as far as a server has so many;
            None where none was given.
    """

    weights: int
    slots: int
    spare: int
    waiting: int
    prefixes: int
    sessions: int
    reserve: int
    total: int
    sessions_kept: int
    slots_that_fit: int | None


@dataclass(frozen=True)
class ServerLoad:
    """The answers of one server; an M/M/c queue with the slots as its servers.

    Steps of fewer rows take less time than those of all slots, with which this reckons: waits are
    shorter than these.

    Attributes:
        speed: of it.
        answers_per_second: the most of which no more than one in a hundred waits longer than asked,
            and whose states the network carries.
        utilization: share of the slots that are busy then.
        mean_wait_seconds: of all answers.
        sessions: that many are as active as asked.
        store_gbits: traffic of writing each answer's state to a shared store, 10⁹ bits a second.
        limited_by: "slots", or "bandwidth" of the store.
    """

    speed: ReplicaSpeed
    answers_per_second: float
    utilization: float
    mean_wait_seconds: float
    sessions: int
    store_gbits: float
    limited_by: str


@dataclass(frozen=True)
class Fleet:
    """Servers and a store for all sessions.

    Attributes:
        sessions: of all users.
        servers: None where no speed is known.
        store_bytes: of all sessions, full grown.
        full_cache_bytes: of the unmodified model's caches, a million tokens each.
    """

    sessions: int
    servers: int | None
    store_bytes: int
    full_cache_bytes: int


@dataclass(frozen=True)
class CapacityPlan:
    """The sessions that servers of a bundle hold and answer.

    Attributes:
        bundle: its folder's name.
        window_size: W.
        slot_bytes: of one slot.
        full_at: tokens behind which a session does not grow any more.
        options: what was asked.
        activity: of a session.
        sizes: of sessions, by tokens read.
        memory: of a server.
        load: of a server; None where no speed is known.
        fleet: None where no number of sessions was given.
    """

    bundle: str
    window_size: int
    slot_bytes: int
    full_at: int
    options: CapacityOptions
    activity: SessionActivity
    sizes: tuple[SessionSize, ...]
    memory: ServerMemory
    load: ServerLoad | None
    fleet: Fleet | None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        return asdict(self)
