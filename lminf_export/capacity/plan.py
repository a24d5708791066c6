"""`plan_capacity`: from a bundle's sizes, a speed and an activity to servers and stores."""

from __future__ import annotations

import math
from pathlib import Path

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.capacity.options import CapacityOptions, ReplicaSpeed, SessionActivity
from lminf_export.capacity.queueing import mean_wait, most_arrivals
from lminf_export.capacity.report import (
    CapacityPlan,
    Fleet,
    ServerLoad,
    ServerMemory,
    SessionSize,
)
from lminf_export.capacity.sizes import StateSizes
from lminf_export.errors import ConfigError, require_instance
from lminf_export.runtime.batching.engine import MOST_SLOTS

GIB = 2**30
LONG_STREAM = 1_000_000
# Share of answers that may wait longer than asked.
LATE = 0.01


def plan_capacity(
    bundle: str | Path,
    options: CapacityOptions | None = None,
    activity: SessionActivity | None = None,
    speed: ReplicaSpeed | None = None,
) -> CapacityPlan:
    """Reckon what a bundle's servers hold and answer; nothing is run.

    Bytes are exact, from the manifest; those of stored sessions are bounds. What a server answers
    is an estimate by an M/M/c queue.

    Args:
        bundle: the bundle's folder, or a file in it.
        options: of the servers.
        activity: of a session.
        speed: of a server with all slots busy; without one no load is reckoned.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: the memory given holds no slot.
        InputError: an argument is of another class.
    """
    options = CapacityOptions() if options is None else options
    activity = SessionActivity() if activity is None else activity
    require_instance("options", options, CapacityOptions)
    require_instance("activity", activity, SessionActivity)
    if speed is not None:
        require_instance("speed", speed, ReplicaSpeed)
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    sizes = StateSizes.of(manifest)
    bits_per_second = options.bandwidth_gbits * 1e9
    lengths = options.tokens or (manifest.settings.window_size, sizes.full_at, LONG_STREAM)
    load = None if speed is None else _load(sizes, options, activity, speed)
    return CapacityPlan(
        bundle=opened.path.resolve().name,
        window_size=manifest.settings.window_size,
        slot_bytes=sizes.slot_bytes,
        full_at=sizes.full_at,
        options=options,
        activity=activity,
        sizes=tuple(_size(manifest, sizes, count, bits_per_second) for count in sorted({*lengths})),
        memory=_memory(manifest, sizes, options),
        load=load,
        fleet=None if options.sessions is None else _fleet(sizes, options.sessions, load),
    )


def _size(
    manifest: Manifest, sizes: StateSizes, tokens: int, bits_per_second: float
) -> SessionSize:
    stored = sizes.stored_bytes(tokens)
    return SessionSize(
        tokens=tokens,
        state_bytes=sizes.state_bytes(tokens),
        stored_bytes=stored,
        per_gib_memory=GIB // sizes.kept_bytes(tokens),
        per_gib_store=GIB // stored,
        move_ms=8e3 * stored / bits_per_second,
        full_cache_bytes=manifest.full_cache_bytes(tokens),
    )


def _memory(manifest: Manifest, sizes: StateSizes, options: CapacityOptions) -> ServerMemory:
    weights = sum(manifest.files[name].bytes for name in manifest.files_of("weights"))
    slot, slots = sizes.slot_bytes, options.slots
    copies = 2 if options.prefix_reuse else 1
    waiting = options.max_waiting * slot
    beside = weights + slot + waiting + options.session_bytes + options.reserve_bytes
    fit = None
    if options.memory is not None:
        fit = min((options.memory - beside) // (copies * slot), MOST_SLOTS)
        if fit < 1:
            raise ConfigError(
                f"memory={options.memory}: weights, {options.max_waiting} sequences that wait, "
                f"kept conversations and what is reserved take {beside} bytes and a slot "
                f"{copies * slot}; give more memory, or fewer max_waiting and session_bytes"
            )
    return ServerMemory(
        weights=weights,
        slots=slots * slot,
        spare=slot,
        waiting=waiting,
        prefixes=(copies - 1) * slots * slot,
        sessions=options.session_bytes,
        reserve=options.reserve_bytes,
        total=beside + copies * slots * slot,
        sessions_kept=options.session_bytes // sizes.kept_bytes(sizes.full_at),
        slots_that_fit=fit,
    )


def _load(
    sizes: StateSizes, options: CapacityOptions, activity: SessionActivity, speed: ReplicaSpeed
) -> ServerLoad:
    slots = options.slots
    # Of one slot, when all of them share the engine's time.
    service = 1 / (slots * speed.seconds(activity))
    by_slots = most_arrivals(slots, service, activity.wait_seconds, LATE)
    stored_bits = 8 * sizes.stored_bytes(sizes.full_at)
    by_bandwidth = options.bandwidth_gbits * 1e9 / stored_bits
    rate = min(by_slots, by_bandwidth)
    return ServerLoad(
        speed=speed,
        answers_per_second=rate,
        utilization=rate / (slots * service),
        mean_wait_seconds=mean_wait(slots, rate, service),
        sessions=int(rate * 3600 / activity.answers_per_hour),
        store_gbits=rate * stored_bits / 1e9,
        limited_by="slots" if by_slots <= by_bandwidth else "bandwidth",
    )


def _fleet(sizes: StateSizes, sessions: int, load: ServerLoad | None) -> Fleet:
    servers = None
    if load is not None:
        if not load.sessions:
            raise ConfigError(
                "one server does not answer even one session as fast as asked: allow more "
                "wait_seconds, or give fewer answers_per_hour or answer_tokens"
            )
        servers = math.ceil(sessions / load.sessions)
    return Fleet(
        sessions=sessions,
        servers=servers,
        store_bytes=sessions * sizes.stored_bytes(sizes.full_at),
        full_cache_bytes=sessions * sizes.manifest.full_cache_bytes(LONG_STREAM),
    )
