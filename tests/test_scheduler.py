"""The scheduler: rows that decode have no gap, nobody starves, and moves keep who is where."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_export.runtime.batching.scheduler import Scheduler


@dataclass(eq=False)
class Stream:
    """A sequence that knows how much of its prompt is left."""

    name: int
    num_unread: int = 1
    reads: list[int] = field(default_factory=list)


class Rows:
    """Who a caller that carries out all moves has in each row."""

    def __init__(self, slots: int) -> None:
        self.held: list[Stream | None] = [None] * slots

    def carry_out(self, moves) -> None:
        for move in moves:
            source, target = self.held[move.source], self.held[move.target]
            self.held[move.target] = source
            if move.kind == "swap":
                self.held[move.source] = target


def admitted(scheduler: Scheduler, rows: Rows):
    while found := scheduler.admit():
        sequence, row = found
        rows.held[row] = sequence


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "read", "decode", "end", "park"]), st.integers(0, 20)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 5), steps=STEPS)
def test_rows_hold_whom_the_scheduler_says_whatever_comes(slots, steps):
    scheduler, rows = Scheduler(slots, quantum=3), Rows(slots)
    live: list[Stream] = []
    for place, (what, number) in enumerate(steps):
        if what == "add":
            live.append(Stream(place, number + 1))
            scheduler.waiting.append(live[-1])
        elif what == "read" and (found := scheduler.next_reader()):
            sequence, row = found
            assert rows.held[row] is sequence
            sequence.num_unread = max(sequence.num_unread - 7, 0)
            if sequence.num_unread == 0:
                rows.carry_out(scheduler.begin_decoding(sequence))
        elif what == "decode":
            scheduler.count_step()
        elif what == "end" and live:
            sequence = live[number % len(live)]
            if scheduler.row_of(sequence) is not None:
                rows.carry_out(scheduler.release(sequence))
                live.remove(sequence)
        elif what == "park" and (sequence := scheduler.overdue()):
            rows.carry_out(scheduler.release(sequence))
            scheduler.waiting.append(sequence)
        admitted(scheduler, rows)
        with_rows = [s for s in live if scheduler.row_of(s) is not None]
        for sequence in with_rows:
            assert rows.held[scheduler.row_of(sequence)] is sequence
        assert [scheduler.row_of(s) for s in scheduler.decoding()] == [
            *range(scheduler.num_decoding)
        ]
        assert len(with_rows) == scheduler.num_decoding + scheduler.num_reading <= slots
        # A row is never free while somebody waits.
        assert not (scheduler.waiting and scheduler.has_free_row)
        assert {*with_rows, *scheduler.waiting} == set(live)


def test_sequences_get_rows_in_the_order_they_came():
    scheduler = Scheduler(2, quantum=10)
    streams = [Stream(index) for index in range(5)]
    scheduler.waiting.extend(streams)
    assert [scheduler.admit()[0] for _ in range(2)] == streams[:2]
    assert scheduler.admit() is None
    scheduler.release(streams[1])
    assert scheduler.admit() == (streams[2], 1)


def test_short_prompts_come_first_and_a_long_one_is_not_starved():
    scheduler = Scheduler(3, quantum=10)
    long, turns = Stream(0, 100_000), []
    scheduler.waiting.append(long)
    scheduler.admit()
    for index in range(40):
        short = Stream(index + 1, 10)
        scheduler.waiting.append(short)
        scheduler.admit()
        while scheduler.row_of(short) is not None:
            sequence, _ = scheduler.next_reader()
            turns.append(sequence.name)
            sequence.num_unread -= 5
            if short.num_unread <= 0:
                scheduler.release(short)
    assert turns[:2] == [1, 1]
    gaps = [place for place, name in enumerate(turns) if name == 0]
    assert len(gaps) > 5
    assert max(b - a for a, b in itertools.pairwise(gaps)) <= 2 * 3 + 1


@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_gives_its_row_only_to_one_that_waits_and_only_after_its_quantum(waits):
    scheduler = Scheduler(2, quantum=4)
    streams = [Stream(0), Stream(1)]
    for stream in streams:
        scheduler.waiting.append(stream)
        scheduler.admit()
        scheduler.begin_decoding(stream)
        scheduler.count_step()
    if waits:
        scheduler.waiting.append(Stream(2))
    scheduler.count_step()
    assert scheduler.overdue() is None
    scheduler.count_step()
    assert scheduler.overdue() is (streams[0] if waits else None)
