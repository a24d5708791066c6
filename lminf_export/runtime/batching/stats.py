"""Counts of an engine, for reports and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine at one moment.

    Attributes:
        slots: rows of its batch.
        active: sequences that have a slot.
        prefilling: those of them that still read their prompt.
        waiting: sequences that wait for a slot, parked ones among them.
        parked: sequences that had a slot and have given it up for a while.
        prompt_tokens: tokens read for prompts, in all.
        new_tokens: tokens chosen, in all.
        steps: steps of decoding, in all.
        step_seconds: time spent in them.
        cache_bytes: of all slots, whether taken or not.
        parked_bytes: of the states of parked sequences.
        healthy: whether the engine's thread runs.
    """

    slots: int
    active: int
    prefilling: int
    waiting: int
    parked: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    step_seconds: float
    cache_bytes: int
    parked_bytes: int
    healthy: bool
