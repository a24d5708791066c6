"""The turns of an engine: arrivals, a step, a piece of a prompt, ends. One thread takes them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np

from lminf_export.errors import LminfError, SessionError
from lminf_export.runtime.batching.request import FinishReason
from lminf_export.runtime.batching.scheduler import Move, Scheduler
from lminf_export.runtime.batching.sequence import (
    Leaving,
    RunningSequence,
    require_number,
)
from lminf_export.runtime.batching.slot_pool import SlotPool
from lminf_export.runtime.snapshot import Snapshot


class Turns:
    """The sequences an engine has taken; a turn steps them and never waits for a reader.

    Args:
        pool: its slots.
        scheduler: of as many.
        on_end: ends a sequence's mailbox with a reason or an error, counts it as ended, and
            returns what wakes its reader, if it waits.
        wake: has functions called that wake readers, and does not wait for that.

    Attributes:
        next_due: when `tend` has to look again at the latest, of `time.perf_counter`.
        prompt_tokens: tokens read for prompts.
        new_tokens: tokens chosen.
        steps: steps of decoding.
        step_seconds: time spent in them.
    """

    def __init__(
        self,
        pool: SlotPool,
        scheduler: Scheduler,
        on_end: Callable[
            [RunningSequence, FinishReason | None, LminfError | None], Callable[[], None] | None
        ],
        wake: Callable[[list[Callable[[], None]]], None],
    ) -> None:
        self.pool, self.scheduler = pool, scheduler
        self.next_due = math.inf
        self.prompt_tokens = self.new_tokens = self.steps = 0
        self.step_seconds = 0.0
        self._on_end, self._wake_readers = on_end, wake
        self._live: set[RunningSequence] = set()
        self._wakers: list[Callable[[], None]] = []

    @property
    def live(self) -> list[RunningSequence]:
        """Sequences that have not ended; any thread may ask."""
        return list(self._live.copy())

    def tend(self, arrived: Iterable[RunningSequence]) -> None:
        """Take what has arrived, end what is to end, let those go on whose reader is back."""
        arrived = list(arrived)
        self._live.update(arrived)
        held = {other for sequence in arrived for other in sequence.others}
        self.scheduler.waiting.extend(s for s in arrived if s not in held)
        now = time.perf_counter()
        for sequence in self.live:
            if sequence.mailbox.cancelled:
                self._finish(sequence, "cancelled")
            elif sequence.is_due(now):
                self._finish(sequence, "deadline")
            elif sequence.stalled_since is not None:
                self._tend_stalled(sequence, now)
        self.next_due = min((s.next_due for s in self._live), default=math.inf)

    def end_all(
        self,
        arrived: Iterable[RunningSequence],
        reason: FinishReason | None,
        error: LminfError | None,
    ) -> None:
        """End whatever is left and what has just arrived, without touching a row."""
        self.scheduler.clear()
        for sequence in [*self.live, *arrived]:
            self._live.discard(sequence)
            self._end(sequence, reason, error)
        self._wake()

    def abandon(self, arrived: Iterable[RunningSequence], error: LminfError) -> None:
        """End whatever is left in a process where no thread takes turns and nobody waits."""
        for sequence in [*self.live, *arrived]:
            sequence.mailbox.end(None, error)
        self.scheduler.clear()
        self._live.clear()
        self._wakers.clear()

    def turn(self) -> bool:
        """Step once; tell whether there was anything to do."""
        scheduler = self.scheduler
        self._fill_rows()
        decodes = scheduler.num_decoding > 0
        if decodes:
            self._decode()
        reader = scheduler.next_reader()
        if reader is not None:
            self._read(*reader)
        self._wake()
        return decodes or reader is not None

    def _tend_stalled(self, sequence: RunningSequence, now: float) -> None:
        if sequence.has_room:
            sequence.stalled_since, sequence.mailbox.is_full = None, False
            self.scheduler.waiting.append(sequence)
        elif now >= sequence.next_due:
            self._finish(sequence, "slow_reader")

    def _fill_rows(self) -> None:
        scheduler = self.scheduler
        while scheduler.waiting:
            if (overdue := scheduler.overdue()) is not None:
                assert isinstance(overdue, RunningSequence)
                if self._park(overdue):
                    scheduler.waiting.append(overdue)
            found = scheduler.admit()
            if found is None:
                return
            sequence, row = found
            assert isinstance(sequence, RunningSequence)
            self._begin(sequence, row)

    def _begin(self, sequence: RunningSequence, row: int) -> None:
        try:
            self.pool.begin(row, sequence.parked)
        except SessionError as error:
            self._finish(sequence, None, error)
            return
        sequence.parked = None
        if sequence.latest is not None:
            self._begin_decoding(sequence)
        elif sequence.first_logits is not None:
            logits, sequence.first_logits = sequence.first_logits, None
            if sequence.only_reads:
                self._finish(sequence, "length")
            else:
                self._choose_first(sequence, logits)

    def _begin_decoding(self, sequence: RunningSequence) -> None:
        assert sequence.latest is not None
        self._move(self.scheduler.begin_decoding(sequence))
        self.pool.latest[self.scheduler.num_decoding - 1] = sequence.latest

    def _park(self, sequence: RunningSequence) -> bool:
        """Keep a sequence's state and take its row away; it ends, and False, if memory is short."""
        row = self.scheduler.row_of(sequence)
        assert row is not None
        try:
            sequence.parked = self._snapshot(row)
        except SessionError as error:
            self._finish(sequence, None, error)
            return False
        self._move(self.scheduler.release(sequence))
        return True

    def _read(self, sequence: object, row: int) -> None:
        """Read a piece of a prompt; behind the last one choose the first token."""
        assert isinstance(sequence, RunningSequence)
        size = self.pool.piece(row, sequence.num_to_read)
        ids = sequence.prompt[sequence.num_read : sequence.num_read + size]
        is_last = size == sequence.num_unread
        try:
            logits = self.pool.read(row, ids, wanted=is_last)
            sequence.num_read += size
            self.prompt_tokens += size
            if sequence.num_read == sequence.request.checkpoint:
                sequence.mailbox.checkpoint = self._snapshot(row)
        except SessionError as error:
            self._finish(sequence, None, error)
            return
        if logits is None:
            return
        self._share(sequence, row, logits)
        if sequence.only_reads:
            self._finish(sequence, "length")
        else:
            self._choose_first(sequence, logits)

    def _share(self, sequence: RunningSequence, row: int, logits: np.ndarray) -> None:
        """Let those who share a prompt go on from where one has read it, before all others."""
        others = [other for other in sequence.others if other in self._live]
        if not others:
            return
        try:
            snapshot, logits = self._snapshot(row), logits.copy()
        except (SessionError, MemoryError):
            # No memory for a copy: the next of them reads the prompt, too.
            self._pass_on(sequence)
            return
        sequence.others = []
        for other in others:
            other.parked, other.first_logits, other.num_read = snapshot, logits, len(other.prompt)
        self.scheduler.waiting.extendleft(reversed(others))

    def _choose_first(self, sequence: RunningSequence, logits: np.ndarray) -> None:
        try:
            token, told = sequence.choose(logits)
            ending = sequence.give(token, told, self._wakers)
        except LminfError as error:
            self._finish(sequence, None, error)
            return
        self.new_tokens += ending != "stop_token"
        if ending is None or ending == "pause":
            self._begin_decoding(sequence)
        if ending is not None:
            self._leave(sequence, ending)

    def _decode(self) -> None:
        """Read the latest token of every sequence that writes, and choose the next ones."""
        scheduler = self.scheduler
        sequences = cast("list[RunningSequence]", scheduler.decoding())
        start = time.perf_counter()
        try:
            logits = self.pool.decode(len(sequences))
        except SessionError as error:
            for sequence in sequences:
                self._finish(sequence, None, error)
            return
        self.step_seconds += time.perf_counter() - start
        self.steps += 1
        scheduler.count_step()
        for sequence, ending in self._choose_all(sequences, logits):
            # Rows move only now: until here the logits' rows are the sequences'.
            if isinstance(ending, LminfError):
                self._finish(sequence, None, ending)
            else:
                self._leave(sequence, ending)

    def _choose_all(
        self, sequences: list[RunningSequence], logits: np.ndarray
    ) -> list[tuple[RunningSequence, Leaving | LminfError]]:
        """Choose a token for every row; return the sequences that do not go on, and why."""
        leaving: list[tuple[RunningSequence, Leaving | LminfError]] = []
        count, wakers, isfinite = len(sequences), self._wakers, math.isfinite
        tokens = logits.argmax(axis=1).tolist()
        for row, sequence in enumerate(sequences):
            told = None
            try:
                if sequence.is_greedy:
                    if not isfinite(largest := logits.item(row, tokens[row])):
                        require_number(largest)
                else:
                    tokens[row], told = sequence.choose(logits[row])
                ending = sequence.give(tokens[row], told, wakers)
            except LminfError as error:
                leaving.append((sequence, error))
                count -= 1
                continue
            if ending is not None:
                leaving.append((sequence, ending))
                count -= ending == "stop_token"
        self.new_tokens += count
        self.pool.latest[: len(sequences), 0] = tokens
        return leaving

    def _leave(self, sequence: RunningSequence, why: Leaving) -> None:
        if why != "pause":
            self._finish(sequence, why)
            return
        # Its reader is too slow: it waits without a row, and nobody waits for it. From here on the
        # reader calls when it takes something; what it took before is looked for behind the copy.
        sequence.mailbox.is_full = True
        if not self._park(sequence):
            return
        now = sequence.stalled_since = time.perf_counter()
        self.next_due = min(self.next_due, sequence.next_due)
        self._tend_stalled(sequence, now)

    def _finish(
        self,
        sequence: RunningSequence,
        reason: FinishReason | None,
        error: LminfError | None = None,
    ) -> None:
        """End a sequence, wherever it is, and free what it holds."""
        scheduler = self.scheduler
        row = scheduler.row_of(sequence)
        if sequence.request.keep and error is None:
            try:
                sequence.mailbox.kept = sequence.kept(self._state_of(sequence, row))
            except SessionError as short:
                reason, error = None, short
        if row is not None:
            if error is not None:
                self.pool.clear(row)
            self._move(scheduler.release(sequence))
        elif sequence in scheduler.waiting:
            scheduler.waiting.remove(sequence)
        self._pass_on(sequence)
        self._live.discard(sequence)
        self._end(sequence, reason, error)

    def _state_of(self, sequence: RunningSequence, row: int | None) -> Snapshot | None:
        """Return where a sequence stands, in its row or parked; None if it has not begun."""
        if row is not None:
            return self._snapshot(row)
        # Others may go on from the same one, or its caller may hold it.
        return None if sequence.parked is None else copy.copy(sequence.parked)

    def _end(
        self, sequence: RunningSequence, reason: FinishReason | None, error: LminfError | None
    ) -> None:
        waker = self._on_end(sequence, reason, error)
        if waker is not None:
            self._wakers.append(waker)

    def _snapshot(self, row: int) -> Snapshot:
        """Copy a row, which takes a while: what was chosen goes to its readers first."""
        self._wake()
        return self.pool.snapshot(row)

    def _wake(self) -> None:
        if self._wakers:
            wakers, self._wakers = self._wakers, []
            self._wake_readers(wakers)

    def _pass_on(self, sequence: RunningSequence) -> None:
        """Let the next of those who share a prompt read it, if this one has not."""
        others = [other for other in sequence.others if other in self._live]
        sequence.others = []
        if others:
            others[0].others = others[1:]
            self.scheduler.waiting.appendleft(others[0])

    def _move(self, moves: list[Move]) -> None:
        for move in moves:
            self.pool.move(move)
