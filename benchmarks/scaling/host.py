"""One simulated server: slots, a queue, and turns of its engine as the real one makes them.

In each turn every stream that writes gets a token and one piece of one prompt is read, so both are
counted in turns, and a turn takes the step of as many streams as write, and the piece. Between two
events nothing of that changes.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import simpy

from benchmarks.scaling.settings import Times


class Job:
    """One turn of a conversation on its way.

    Attributes:
        session: whose.
        arrived: when it was asked for.
        prompt, answer: tokens to read and to write.
        source: where its state came from, "memory", "store" or "reread".
        counts: whether it arrived behind the warm-up.
        tries: servers that it was sent to.
        host: where it is.
        read: tokens to read before the first one is written.
        first: seconds from when it was asked for to its first token, of the latest try.
    """

    __slots__ = (
        *("session", "arrived", "prompt", "answer", "source", "counts", "tries", "host"),
        *("first", "read"),
    )

    def __init__(self, session: Any, arrived: float, prompt: int, answer: int) -> None:
        self.session, self.arrived, self.prompt, self.answer = session, arrived, prompt, answer
        self.source, self.counts, self.tries = "", True, 0
        self.host: Host | None = None
        self.read, self.first = 0, 0.0


class Host:
    """A server.

    Args:
        env: whose time passes.
        number: of it, in the ring.
        times: of its engine.
        slots: streams at once.
        max_waiting: jobs that may wait for one.
        most_bytes: of the states in its memory.
        done: called with a job whose last token is written.

    Attributes:
        is_up: whether it runs.
        takes: whether new turns are sent to it.
        jobs: everything that was sent here and is not over.
        memory: session → version and bytes of its state, the latest used last.
        busy_seconds: of all slots.
    """

    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        times: Times,
        slots: int,
        max_waiting: int,
        most_bytes: int,
        done: Callable[[Job], None],
    ) -> None:
        self._env, self._times, self._slots, self._max_waiting = env, times, slots, max_waiting
        self._done, self._most_bytes = done, most_bytes
        self.number = number
        self.is_up = self.takes = True
        self.jobs: dict[Job, None] = {}
        self.memory: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._kept_bytes = 0
        self.busy_seconds = 0.0
        self._waiting: deque[Job] = deque()
        self._readers: deque[tuple[Job, int, float]] = deque()  # job, pieces, seconds of a piece
        self._writers: dict[Job, float] = {}  # → the turn of its last token
        self._turns = 0.0
        self._read_at = 0.0  # the turn at which the first reader is through
        self._since = env.now
        self._due = float("inf")

    def keep(self, session: int, version: int, nbytes: int, *, is_latest: bool = True) -> bool:
        """Keep a state in memory; the least recently used make room. Tell whether it stays.

        Args:
            session: whose.
            version: of it.
            nbytes: of it.
            is_latest: whether it was used last; else it is the first to make room.
        """
        memory = self.memory
        self._kept_bytes -= memory.pop(session, (0, 0))[1]
        if nbytes > self._most_bytes:
            return False
        self._kept_bytes += nbytes
        memory[session] = version, nbytes
        memory.move_to_end(session, last=is_latest)
        while self._kept_bytes > self._most_bytes:
            _, (_, freed) = memory.popitem(last=False)
            self._kept_bytes -= freed
        return session in memory

    def submit(self, job: Job) -> bool:
        """Give a job a slot, or a place in the queue; tell whether there was one."""
        if self._busy < self._slots:
            self._pass()
            self._begin(job)
            self._plan()
        elif len(self._waiting) < self._max_waiting:
            self._waiting.append(job)
        else:
            return False
        return True

    def clear(self) -> list[Job]:
        """Forget everything, as a process that ends does; return the jobs that were here."""
        self._pass()
        lost = list(self.jobs)
        for held in (self.jobs, self.memory, self._waiting, self._readers, self._writers):
            held.clear()
        self._kept_bytes = 0
        self._due = float("inf")
        return lost

    def settle(self) -> None:
        """Count the slots' time up to now."""
        self._pass()

    @property
    def _busy(self) -> int:
        return len(self._readers) + len(self._writers)

    def _begin(self, job: Job) -> None:
        if not job.read:
            self._write(job)
            return
        pieces = -(-job.read // self._times.chunk)
        rest = job.read - (pieces - 1) * self._times.chunk
        piece = self._times.piece_seconds
        seconds = (piece(self._times.chunk) * (pieces - 1) + piece(rest)) / pieces
        self._readers.append((job, pieces, seconds))
        if len(self._readers) == 1:
            self._read_at = self._turns + pieces

    def _write(self, job: Job) -> None:
        """Let a job write: its first token follows from what it has read."""
        assert self.is_up, "a dead server writes"
        job.first = self._env.now - job.arrived
        self._writers[job] = self._turns + job.answer - 1

    def _turn_seconds(self) -> float:
        writing = len(self._writers)
        step = self._times.step[writing - 1] if writing else 0.0
        return step + (self._readers[0][2] if self._readers else 0.0)

    def _pass(self) -> None:
        """Let the turns pass that were made since the last event."""
        elapsed = self._env.now - self._since
        self._since = self._env.now
        busy = self._busy
        if busy and elapsed:
            self.busy_seconds += busy * elapsed
            self._turns += elapsed / self._turn_seconds()

    def _plan(self) -> None:
        """Wake up at the next end of a prompt or an answer, unless that is planned."""
        ends = list(self._writers.values())
        if self._readers:
            ends.append(self._read_at)
        if not ends:
            return
        due = self._env.now + max(min(ends) - self._turns, 0.0) * self._turn_seconds()
        # An earlier wake-up finds nothing over and plans anew, which costs less than to cancel it.
        if due < self._due:
            self._due = due
            self._env.timeout(due - self._env.now, due).callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        if event.value != self._due:
            return
        self._due = float("inf")
        self._pass()
        # What is left of a turn may be less than the clock can tell.
        left = 4 * math.ulp(self._env.now) / self._turn_seconds() if self._busy else 0.0
        now = self._turns + max(left, 1e-6)
        if self._readers and self._read_at <= now:
            job, _, _ = self._readers.popleft()
            if self._readers:
                self._read_at = self._turns + self._readers[0][1]
            self._write(job)
        for job in [job for job, end in self._writers.items() if end <= now]:
            del self._writers[job]
            self._done(job)
        while self._waiting and self._busy < self._slots:
            self._begin(self._waiting.popleft())
        self._plan()
