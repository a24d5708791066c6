"""Waking readers in a thread of its own, so that no step waits while they take their tokens.

A call into an event loop writes to a socket, which gives Python's lock away: the reader that it
wakes would take it, and the engine's thread would begin its next step only when the reader is done.
This thread gets the lock when the step has begun, and needs it no more.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

from lminf_export.runtime.batching.stream import wake_all
from lminf_export.runtime.batching.threads import EngineThread

Wakers = list[Callable[[], None]]


class WakingThread:
    """Calls what wakes readers, in the order in which it was given; without `start`, at once."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Wakers | None] = SimpleQueue()
        self._thread = EngineThread(self._run, "lminf-wake")

    def start(self) -> None:
        """Begin the thread."""
        self._thread.start()

    def wake(self, wakers: Wakers) -> None:
        """Have functions called soon; never waits."""
        if self._thread.is_alive():
            self._given.put(wakers)
        else:
            wake_all(wakers)

    def close(self) -> None:
        """End the thread once everything given before has been called."""
        self._given.put(None)

    def _run(self) -> None:
        while (wakers := self._given.get()) is not None:
            wake_all(wakers)
