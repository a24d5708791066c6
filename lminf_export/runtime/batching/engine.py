"""An engine: many requests over one session, which join and leave between its steps."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from lminf_export.errors import BusyError, InputError, LminfError, SessionError, shown
from lminf_export.operator.settings import as_integer, as_number
from lminf_export.runtime.batching.accepting import Acceptor
from lminf_export.runtime.batching.request import FinishReason, Request
from lminf_export.runtime.batching.scheduler import Scheduler
from lminf_export.runtime.batching.sequence import RunningSequence
from lminf_export.runtime.batching.slot_pool import SlotPool
from lminf_export.runtime.batching.stats import EngineStats
from lminf_export.runtime.batching.stream import TokenStream
from lminf_export.runtime.batching.turns import Turns
from lminf_export.runtime.batching.waking import WakingThread
from lminf_export.runtime.language_model import LanguageModel

DEFAULT_SLOTS = 8
DEFAULT_MAX_WAITING = 256
DEFAULT_QUANTUM = 512
# A slot is a row of one batch, with views of its own.
_MOST_SLOTS = 4096

# Engines whose thread may run: it must not be in a step while Python ends.
_RUNNING: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_RUNNING):
        engine.close()


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
        if not isinstance(lm, LanguageModel):
            raise InputError(f"lm={shown(lm)}: must be a LanguageModel, see load")
        slots = as_integer("slots", slots, 1, InputError, maximum=_MOST_SLOTS)
        self.max_waiting = as_integer("max_waiting", max_waiting, 0, InputError)
        quantum = as_integer("quantum", quantum, 1, InputError)
        largest = lm.bundle.manifest.lambda_config.chunk_size
        chunk = (
            largest if chunk_size is None else as_integer("chunk_size", chunk_size, 1, InputError)
        )
        self.lm, self.slots = lm, slots
        pool = SlotPool(lm, slots, min(chunk, largest))
        self._waking = WakingThread()
        self._turns = Turns(pool, Scheduler(slots, quantum), self._end, self._waking.wake)
        self._acceptor = Acceptor(lm, self._call)
        self._changed = threading.Condition()
        self._inbox: list[RunningSequence] = []
        self._num_pending = 0
        self._called = False
        self._closing = self._draining = False
        self._healthy = True
        self._thread = threading.Thread(target=self._run, name="lminf-engine", daemon=True)
        try:
            self._thread.start()
            _RUNNING.add(self)
        except BaseException:
            # Interrupted: nobody gets this engine, so the thread, if there is one, ends.
            self._closing = True
            self._call()
            self._waking.close()
            raise

    # What any thread may call.

    def submit(self, request: Request) -> TokenStream:
        """Take a request; its tokens come as they are chosen.

        Raises:
            InputError: the request cannot be served: a prompt or a number that is wrong.
            BusyError: as many requests wait as may.
            SessionError: the engine was closed or has failed, or the request is to go on from a
                state of another bundle.
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
        most = self.max_waiting + self.slots
        if n > most:
            raise InputError(f"n={n}: this engine runs and holds at most {most} requests")
        sequences, streams = self._acceptor.accepted(request, n, ends_at)
        with self._changed:
            if self._closing or self._draining or not self._healthy:
                state = "has failed" if not self._healthy else "is closed"
                raise SessionError(f"this engine {state}; it takes no requests: make a new one")
            if self._num_pending + n > most:
                raise BusyError(
                    f"{self._num_pending} requests run or wait, at most {most} may; try again later"
                )
            self._num_pending += n
            first, *others = sequences
            first.others = others
            self._inbox.extend(sequences)
            self._called = True
            self._changed.notify_all()  # `drain` may wait there, too
        return streams

    def stats(self) -> EngineStats:
        """Return the engine's counts; cheap."""
        turns, scheduler = self._turns, self._turns.scheduler
        parked = [
            sequence.parked
            for sequence in turns.live
            if sequence.latest is not None and sequence.parked is not None
        ]
        active = scheduler.num_decoding + scheduler.num_reading
        return EngineStats(
            slots=self.slots,
            active=active,
            prefilling=scheduler.num_reading,
            waiting=max(self._num_pending - active, 0),
            parked=len(parked),
            prompt_tokens=turns.prompt_tokens,
            new_tokens=turns.new_tokens,
            steps=turns.steps,
            step_seconds=turns.step_seconds,
            cache_bytes=turns.pool.nbytes,
            parked_bytes=sum(snapshot.nbytes for snapshot in parked),
            healthy=self._healthy,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until the ones there are have ended.

        Args:
            timeout: seconds to wait; None waits for as long as they take.

        Returns:
            Whether all have ended.

        Raises:
            InputError: seconds that are none.
        """
        if timeout is not None:
            timeout = min(as_number("timeout", timeout, InputError), threading.TIMEOUT_MAX)
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
            self._changed.notify_all()  # `drain` may wait there, too

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._called or time.perf_counter() >= self._turns.next_due:
                    self._tend()
                if not self._turns.turn():
                    self._sleep()
        finally:
            self._end_all()
            self._waking.close()

    def _sleep(self) -> None:
        with self._changed:
            if not self._called and not self._closing:
                rest = self._turns.next_due - time.perf_counter()
                self._changed.wait(min(max(rest, 0.0), threading.TIMEOUT_MAX))

    def _tend(self) -> None:
        with self._changed:
            self._called = False
            arrived, self._inbox = self._inbox, []
        self._turns.tend(arrived)

    def _end(
        self, sequence: RunningSequence, reason: FinishReason | None, error: LminfError | None
    ) -> Callable[[], None] | None:
        """End a request that has left everything; return what wakes its reader, if it waits."""
        with self._changed:
            # Counted first: who sees the end sees the counts that belong to it.
            self._num_pending -= 1
            waker = sequence.mailbox.end(reason, error)
            self._changed.notify_all()
        return waker

    def _end_all(self) -> None:
        """End whatever is left: "closed", or an error if the thread has failed."""
        with self._changed:
            failed = not self._closing
            self._healthy, self._closing = not failed, True
            arrived, self._inbox = self._inbox, []
        error = SessionError("this engine has failed; see its log") if failed else None
        self._turns.end_all(arrived, None if failed else "closed", error)
