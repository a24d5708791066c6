"""The thread of an engine, and what other threads tell it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from lminf_export.errors import BusyError, LminfError, SessionError
from lminf_export.runtime.batching.request import FinishReason
from lminf_export.runtime.batching.scheduler import Scheduler
from lminf_export.runtime.batching.sequence import RunningSequence
from lminf_export.runtime.batching.slot_pool import SlotPool
from lminf_export.runtime.batching.threads import EngineThread, require_other_thread
from lminf_export.runtime.batching.turns import Turns
from lminf_export.runtime.batching.waking import WakingThread

logger = logging.getLogger(__name__)


class EngineLoop:
    """A thread that takes turns for as long as there is something to do, and sleeps else.

    It does not hold the engine it belongs to, which may thus be forgotten while the thread runs.

    Args:
        pool: the slots.
        scheduler: of as many.
        most: requests that may run or wait.

    Attributes:
        turns: that it takes.
        is_healthy: whether it has not failed.
    """

    def __init__(self, pool: SlotPool, scheduler: Scheduler, most: int) -> None:
        self._waking = WakingThread()
        self.turns = Turns(pool, scheduler, self._end, self._waking.wake)
        self.is_healthy = True
        self._most = most
        # A lock of C: an interrupt cannot come between its taking and the block behind it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._arrived: list[list[RunningSequence]] = []
        self._num_taken = 0
        # Its `put` may be called anywhere, also by a finalizer that runs within another call of it.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._called = False
        self._closing = self._draining = False
        self._refusal = "is closed"
        self._thread = EngineThread(self._run, "lminf-engine")

    # What any thread may call.

    def start(self) -> None:
        """Begin the thread.

        Raises:
            SessionError: the system gives no more threads.
        """
        _LOOPS.add(self)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise SessionError(f"an engine needs a thread of its own: {error}") from None
        except BaseException:
            # Interrupted: nobody gets this engine, so the thread, if there is one, ends.
            self.stop()
            raise

    @property
    def num_pending(self) -> int:
        """Requests that run or wait."""
        return self._num_taken + sum(map(len, self._arrived))

    def give(self, sequences: list[RunningSequence]) -> None:
        """Give the thread sequences of one prompt, all or none.

        Raises:
            BusyError: as many run or wait as may.
            SessionError: no more are taken.
        """
        first, *others = sequences
        first.others = others
        with self._lock:
            if self._closing or self._draining:
                raise SessionError(
                    f"this engine {self._refusal}; it takes no requests: make a new one"
                )
            pending = self.num_pending
            if pending + len(sequences) > self._most:
                raise BusyError(
                    f"{pending} requests run or wait, at most {self._most} may; try again later"
                )
            self._arrived.append(sequences)
            self.call()

    def call(self) -> None:
        """Let the thread look at what callers want, before its next step; never waits."""
        self._calls.put(None)

    def drain(self, timeout: float | None) -> bool:
        """Take no more sequences, wait until all have ended, and tell whether they have.

        Args:
            timeout: seconds to wait; None for as long as they take.

        Raises:
            SessionError: called by a function of a request, in the thread that it waits for.
        """
        require_other_thread("drain()")
        with self._lock:
            self._draining = True
            return self._changed.wait_for(lambda: not self.num_pending, timeout)

    def stop(self) -> None:
        """Let the thread end everything and itself, without waiting for it."""
        self._closing = True
        self.call()

    def close(self) -> None:
        """Let the thread end everything and itself, and wait for that."""
        self.stop()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join()

    def lose(self) -> None:
        """End everything in a process in which the thread does not run: a fork has no threads."""
        # Whoever held the lock is not there either.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.is_healthy, self._closing = False, True
        self._refusal = "belongs to the process that was forked"
        error = SessionError(f"this engine {self._refusal}: make one behind the fork, or spawn")
        self.turns.abandon(self._take_arrived(), error)
        self._num_taken = 0

    # The thread.

    def _run(self) -> None:
        try:
            # Started here, where no interrupt comes.
            self._waking.start()
            while not self._closing:
                if (
                    self._called
                    or not self._calls.empty()
                    or time.perf_counter() >= self.turns.next_due
                ):
                    self._tend()
                if not self.turns.turn():
                    self._sleep()
        except BaseException:
            logger.critical("an engine has failed; all its requests end", exc_info=True)
            self._end_all(SessionError("this engine has failed; see its log"))
        else:
            self._end_all(None)
        finally:
            self._waking.close()

    def _sleep(self) -> None:
        if self._closing:
            return  # `_tend` may have taken the call that told of it
        rest = self.turns.next_due - time.perf_counter()
        with suppress(Empty):
            self._calls.get(timeout=min(max(rest, 0.0), threading.TIMEOUT_MAX))
            self._called = True

    def _tend(self) -> None:
        self._called = False
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        with self._lock:
            arrived = self._take_arrived()
        self.turns.tend(arrived)

    def _take_arrived(self) -> list[RunningSequence]:
        arrived, self._arrived = [s for group in self._arrived for s in group], []
        self._num_taken += len(arrived)
        return arrived

    def _end(
        self, sequence: RunningSequence, reason: FinishReason | None, error: LminfError | None
    ) -> Callable[[], None] | None:
        """End a request that has left everything; return what wakes its reader, if it waits."""
        with self._lock:
            # Counted first: who sees the end sees the counts that belong to it.
            self._num_taken -= 1
            waker = sequence.mailbox.end(reason, error)
            self._changed.notify_all()
        return waker

    def _end_all(self, error: SessionError | None) -> None:
        """End whatever is left: "closed", or an error if the thread has failed."""
        with self._lock:
            if error is not None:
                self.is_healthy, self._refusal = False, "has failed"
            self._closing = True
            arrived = self._take_arrived()
        self.turns.end_all(arrived, "closed" if error is None else None, error)


# Loops whose thread may run: it must not be in a step while Python ends.
_LOOPS: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loop in list(_LOOPS):
        loop.close()


def _lose_all() -> None:
    for loop in list(_LOOPS):
        loop.lose()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_lose_all)
