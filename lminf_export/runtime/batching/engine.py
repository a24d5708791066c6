"""An engine: many requests over one session, which join and leave between its steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from lminf_export.errors import BusyError, InputError, LminfError, SessionError
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.batching.accepting import Acceptor
from lminf_export.runtime.batching.request import FinishReason, Request, Token
from lminf_export.runtime.batching.scheduler import Move, Scheduler
from lminf_export.runtime.batching.sequence import RunningSequence, require_number
from lminf_export.runtime.batching.slot_pool import SlotPool
from lminf_export.runtime.batching.stream import TokenStream, wake_all
from lminf_export.runtime.language_model import LanguageModel

DEFAULT_SLOTS = 8
DEFAULT_MAX_WAITING = 256
DEFAULT_QUANTUM = 512
# Tokens that wait for a reader at most: its sequence then pauses, and goes on at half of them.
MAILBOX_TOKENS = 4096
_PAUSE: Literal["pause"] = "pause"


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


class Engine:
    """Slots over one session; a thread of its own steps over those that are taken.

    A turn is one step of decoding for all sequences that write, and one piece of the prompt of
    one that reads: no stream waits longer than for one piece. What a request gets does not
    depend on who shares the batch.

    Args:
        lm: whose session runs; nobody else should run it meanwhile.
        slots: sequences that decode side by side; their caches are allocated at once.
        max_waiting: requests that may wait for a slot.
        quantum: tokens after which a sequence gives its slot to one that waits; its state is
            kept in main memory until its turn comes again.
        chunk_size: tokens of a prompt read at once; the bundle's by default, and at most.

    Raises:
        InputError: a number that is none, or too small.
        SessionError: the slots' caches are more than the memory holds.
    """

    def __init__(
        self,
        lm: LanguageModel,
        slots: int = DEFAULT_SLOTS,
        *,
        max_waiting: int = DEFAULT_MAX_WAITING,
        quantum: int = DEFAULT_QUANTUM,
        chunk_size: int | None = None,
    ) -> None:
        slots = as_integer("slots", slots, 1, InputError)
        self.max_waiting = as_integer("max_waiting", max_waiting, 0, InputError)
        quantum = as_integer("quantum", quantum, 1, InputError)
        largest = lm.bundle.manifest.lambda_config.chunk_size
        chunk = (
            largest if chunk_size is None else as_integer("chunk_size", chunk_size, 1, InputError)
        )
        self.lm = lm
        self._pool = SlotPool(lm, slots, min(chunk, largest))
        self._scheduler = Scheduler(slots, quantum)
        self._acceptor = Acceptor(lm, self._call)
        self._changed = threading.Condition()
        self._inbox: list[RunningSequence] = []
        self._live: set[RunningSequence] = set()
        self._num_pending = 0
        self._called = False
        self._closing = self._draining = False
        self._next_due = float("inf")
        self._wakers: list[Callable[[], None]] = []
        self._prompt_tokens = self._new_tokens = self._steps = 0
        self._step_seconds = 0.0
        self._healthy = True
        self._thread = threading.Thread(target=self._run, name="lminf-engine", daemon=True)
        self._thread.start()

    # What any thread may call.

    def submit(self, request: Request) -> TokenStream:
        """Take a request; its tokens come as they are chosen.

        Raises:
            InputError: the request cannot be served: a prompt, a number or a state that is wrong.
            BusyError: as many requests wait as may.
            SessionError: the engine was closed or has failed.
        """
        return self.submit_many(request, 1)[0]

    def submit_many(
        self,
        request: Request,
        n: int,
        *,
        ends_at: Sequence[Callable[[int], bool]] | None = None,
    ) -> list[TokenStream]:
        """Take a request for several continuations of one prompt, which is read once.

        Args:
            request: continuation i draws with its seed + i.
            n: how many.
            ends_at: `Request.ends_at` of each continuation; by default the request's own, for all.

        Raises:
            InputError, BusyError, SessionError: see `submit`.
        """
        n = as_integer("n", n, 1, InputError)
        sequences, streams = self._acceptor.accepted(request, n, ends_at)
        with self._changed:
            if self._closing or self._draining or not self._healthy:
                state = "has failed" if not self._healthy else "is closed"
                raise SessionError(f"this engine {state}; it takes no requests: make a new one")
            if self._num_pending + n > self.max_waiting + self._scheduler.slots:
                raise BusyError(
                    f"{self._num_pending} requests run or wait, at most "
                    f"{self.max_waiting + self._scheduler.slots} may; try again later"
                )
            self._num_pending += n
            first, *others = sequences
            first.others = others
            self._inbox.extend(sequences)
            self._called = True
            self._changed.notify()
        return streams

    def stats(self) -> EngineStats:
        """Return the engine's counts; cheap."""
        scheduler = self._scheduler
        live = tuple(self._live.copy())
        parked = [s.parked for s in live if s.latest is not None and s.parked is not None]
        active = scheduler.num_decoding + scheduler.num_reading
        return EngineStats(
            slots=scheduler.slots,
            active=active,
            prefilling=scheduler.num_reading,
            waiting=max(self._num_pending - active, 0),
            parked=len(parked),
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            steps=self._steps,
            step_seconds=self._step_seconds,
            cache_bytes=self._pool.nbytes,
            parked_bytes=sum(snapshot.nbytes for snapshot in parked),
            healthy=self._healthy,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until the ones there are have ended.

        Args:
            timeout: seconds to wait; None waits for as long as they take.

        Returns:
            Whether all have ended.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._num_pending, timeout)

    def close(self) -> None:
        """End all requests with "closed", and the thread."""
        with self._changed:
            self._closing = self._called = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self) -> None:
        """Let the engine look at what callers want, before its next step."""
        with self._changed:
            self._called = True
            self._changed.notify()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._called or time.perf_counter() >= self._next_due:
                    self._tend()
                if not self._turn():
                    self._sleep()
        finally:
            self._end_all()

    def _turn(self) -> bool:
        """Step once; tell whether there was anything to do."""
        scheduler = self._scheduler
        self._fill_rows()
        decodes = scheduler.num_decoding > 0
        if decodes:
            self._decode()
        reader = scheduler.next_reader()
        if reader is not None:
            self._read(*reader)
        if self._wakers:
            wakers, self._wakers = self._wakers, []
            wake_all(wakers)
        return decodes or reader is not None

    def _sleep(self) -> None:
        with self._changed:
            if not self._called and not self._closing:
                rest = self._next_due - time.perf_counter()
                self._changed.wait(None if rest == float("inf") else max(rest, 0.0))

    def _tend(self) -> None:
        """Take new requests, end those that are to end, let those go on whose reader is back."""
        with self._changed:
            self._called = False
            arrived, self._inbox = self._inbox, []
        self._live.update(arrived)
        held = {other for sequence in arrived for other in sequence.others}
        self._scheduler.waiting.extend(s for s in arrived if s not in held)
        now = time.perf_counter()
        for sequence in list(self._live):
            if sequence.mailbox.cancelled:
                self._finish(sequence, "cancelled")
            elif sequence.is_due(now):
                self._finish(sequence, "deadline")
            elif sequence.stalled_since is not None:
                self._tend_stalled(sequence, now)
        self._next_due = min((s.next_due for s in self._live), default=float("inf"))

    def _tend_stalled(self, sequence: RunningSequence, now: float) -> None:
        if len(sequence.mailbox.items) <= MAILBOX_TOKENS // 2:
            sequence.stalled_since, sequence.mailbox.is_full = None, False
            self._scheduler.waiting.append(sequence)
        elif now >= sequence.next_due:
            self._finish(sequence, "slow_reader")

    def _fill_rows(self) -> None:
        scheduler = self._scheduler
        while scheduler.waiting:
            if (overdue := scheduler.overdue()) is not None:
                assert isinstance(overdue, RunningSequence)
                self._park(overdue)
                scheduler.waiting.append(overdue)
            found = scheduler.admit()
            if found is None:
                return
            sequence, row = found
            assert isinstance(sequence, RunningSequence)
            self._begin(sequence, row)

    def _begin(self, sequence: RunningSequence, row: int) -> None:
        try:
            self._pool.begin(row, sequence.parked)
        except SessionError as error:
            self._finish(sequence, None, error)
            return
        sequence.parked = None
        if sequence.latest is not None:
            self._begin_decoding(sequence)
        elif sequence.first_logits is not None:
            logits, sequence.first_logits = sequence.first_logits, None
            self._choose_first(sequence, logits)

    def _begin_decoding(self, sequence: RunningSequence) -> None:
        assert sequence.latest is not None
        self._move(self._scheduler.begin_decoding(sequence))
        self._pool.latest[self._scheduler.num_decoding - 1] = sequence.latest

    def _park(self, sequence: RunningSequence) -> None:
        """Keep a sequence's state and take its row away."""
        row = self._scheduler.row_of(sequence)
        assert row is not None
        sequence.parked = self._pool.snapshot(row)
        self._move(self._scheduler.release(sequence))

    def _read(self, sequence: object, row: int) -> None:
        """Read a piece of a prompt; behind the last one choose the first token."""
        assert isinstance(sequence, RunningSequence)
        size = self._pool.piece(row, sequence.num_unread)
        ids = sequence.prompt[sequence.num_read : sequence.num_read + size]
        is_last = size == sequence.num_unread
        try:
            logits = self._pool.read(row, ids, wanted=is_last)
        except SessionError as error:
            self._finish(sequence, None, error)
            return
        sequence.num_read += size
        self._prompt_tokens += size
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
        sequence.others = []
        if not others:
            return
        snapshot, logits = self._pool.snapshot(row), logits.copy()
        for other in others:
            other.parked, other.first_logits, other.num_read = snapshot, logits, len(other.prompt)
        self._scheduler.waiting.extendleft(reversed(others))

    def _choose_first(self, sequence: RunningSequence, logits: np.ndarray) -> None:
        try:
            token, told = sequence.choose(logits)
            ending = self._accept(sequence, token, told)
        except LminfError as error:
            self._finish(sequence, None, error)
            return
        if ending is None or ending == _PAUSE:
            self._begin_decoding(sequence)
        if ending is not None:
            self._leave(sequence, ending)

    def _decode(self) -> None:
        """Read the latest token of every sequence that writes, and choose the next ones."""
        scheduler = self._scheduler
        sequences = cast("list[RunningSequence]", scheduler.decoding())
        start = time.perf_counter()
        try:
            logits = self._pool.decode(len(sequences))
        except SessionError as error:
            for sequence in sequences:
                self._finish(sequence, None, error)
            return
        self._step_seconds += time.perf_counter() - start
        self._steps += 1
        scheduler.count_step()
        for sequence, ending in self._choose_all(sequences, logits):
            # Rows move only now: until here the logits' rows are the sequences'.
            if isinstance(ending, LminfError):
                self._finish(sequence, None, ending)
            else:
                self._leave(sequence, ending)

    def _choose_all(
        self, sequences: list[RunningSequence], logits: np.ndarray
    ) -> list[tuple[RunningSequence, FinishReason | Literal["pause"] | LminfError]]:
        """Choose a token for every row; return the sequences that do not go on, and why."""
        leaving: list[tuple[RunningSequence, FinishReason | Literal["pause"] | LminfError]] = []
        likeliest = logits.argmax(axis=1)
        largest = logits[self._pool.row_numbers[: len(sequences)], likeliest].tolist()
        tokens = likeliest.tolist()
        for row, sequence in enumerate(sequences):
            try:
                told = None
                if sequence.is_greedy:
                    require_number(largest[row])
                else:
                    tokens[row], told = sequence.choose(logits[row])
                ending = self._accept(sequence, tokens[row], told)
            except LminfError as error:
                leaving.append((sequence, error))
                continue
            if ending is not None:
                leaving.append((sequence, ending))
        self._pool.latest[: len(sequences), 0] = tokens
        return leaving

    def _accept(
        self, sequence: RunningSequence, token: int, told: Token | None
    ) -> FinishReason | Literal["pause"] | None:
        """Return a chosen token to whoever asked; tell why the sequence leaves its row, if so."""
        is_returned, reason = sequence.accept(token)
        mailbox = sequence.mailbox
        if is_returned:
            self._new_tokens += 1
            waker = mailbox.put(token if told is None else told)
            if waker is not None:
                self._wakers.append(waker)
        if reason is None and len(mailbox.items) >= MAILBOX_TOKENS:
            return _PAUSE
        return reason

    def _leave(self, sequence: RunningSequence, why: FinishReason | Literal["pause"]) -> None:
        if why != "pause":
            self._finish(sequence, why)
            return
        # Its reader is too slow: it waits without a row, and nobody waits for it.
        self._park(sequence)
        sequence.stalled_since = time.perf_counter()
        self._next_due = min(self._next_due, sequence.next_due)
        sequence.mailbox.is_full = True

    def _finish(
        self,
        sequence: RunningSequence,
        reason: FinishReason | None,
        error: LminfError | None = None,
    ) -> None:
        """End a sequence, wherever it is, and free what it holds."""
        scheduler = self._scheduler
        snapshot = sequence.parked
        row = scheduler.row_of(sequence)
        if row is not None:
            if error is not None:
                self._pool.clear(row)
            elif sequence.request.keep:
                snapshot = self._pool.snapshot(row)
            self._move(scheduler.release(sequence))
        elif sequence in scheduler.waiting:
            scheduler.waiting.remove(sequence)
        if sequence.request.keep and error is None:
            sequence.mailbox.kept = sequence.kept(snapshot)
        self._pass_on(sequence)
        self._live.discard(sequence)
        with self._changed:
            # Counted first: who sees the end sees the counts that belong to it.
            self._num_pending -= 1
            waker = sequence.mailbox.end(reason, error)
            self._changed.notify_all()
        if waker is not None:
            self._wakers.append(waker)

    def _pass_on(self, sequence: RunningSequence) -> None:
        """Let the next of those who share a prompt read it, if this one has not."""
        others = [other for other in sequence.others if other in self._live]
        sequence.others = []
        if others:
            others[0].others = others[1:]
            self._scheduler.waiting.appendleft(others[0])

    def _move(self, moves: list[Move]) -> None:
        for move in moves:
            self._pool.move(move)

    def _end_all(self) -> None:
        """End whatever is left: "closed", or an error if the thread has failed."""
        with self._changed:
            failed = not self._closing
            self._healthy, self._closing = not failed, True
            left = [*self._live, *self._inbox]
            self._inbox = []
        error = SessionError("this engine has failed; see its log") if failed else None
        for sequence in left:
            waker = sequence.mailbox.end(None if failed else "closed", error)
            if waker is not None:
                self._wakers.append(waker)
        self._live.clear()
        wake_all(self._wakers)
        with self._changed:
            self._num_pending = 0
            self._changed.notify_all()
