"""An engine: many requests over one session, which join and leave between its steps."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence

from lminf_export.errors import InputError, require_instance
from lminf_export.operator.settings import as_integer, as_number
from lminf_export.runtime.batching.accepting import Acceptor
from lminf_export.runtime.batching.loop import EngineLoop
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.batching.scheduler import Scheduler
from lminf_export.runtime.batching.slot_pool import SlotPool
from lminf_export.runtime.batching.stats import EngineStats
from lminf_export.runtime.batching.stream import TokenStream
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.unpicklable import Unpicklable

DEFAULT_SLOTS = 8
DEFAULT_MAX_WAITING = 256
DEFAULT_QUANTUM = 512
DEFAULT_READER_TIMEOUT = 60.0
# A slot is a row of one batch, with views of its own.
MOST_SLOTS = 4096


class Engine(Unpicklable):
    """Slots over one session; a thread of its own steps over those that are taken.

    A turn is one step of decoding for all sequences that write, and one piece of the prompt of
    one that reads: no stream waits longer than for one piece. What a request gets does not
    depend on who shares the batch. An engine that nobody holds any more, nor one of its streams,
    is closed.

    Args:
        lm: whose session runs; nobody else should run it meanwhile.
        slots: sequences that decode side by side; their caches are allocated at once.
        max_waiting: requests that may wait for a slot.
        quantum: tokens after which a sequence gives its slot to one that waits; its state is
            kept in main memory until its turn comes again.
        chunk_size: tokens of a prompt read at once; the bundle's by default, and at most. Where a
            prompt is cut changes its logits a little, those of quantised weights more.
        reader_timeout: seconds that a request whose reader takes nothing may pause before it ends
            with "slow_reader"; None for no end.

    Raises:
        InputError: a number that is none, or too small.
        SessionError: the slots' caches are more than the memory holds, or there is no thread.
    """

    in_its_place = "make another one"

    def __init__(
        self,
        lm: LanguageModel,
        slots: int = DEFAULT_SLOTS,
        *,
        max_waiting: int = DEFAULT_MAX_WAITING,
        quantum: int = DEFAULT_QUANTUM,
        chunk_size: int | None = None,
        reader_timeout: float | None = DEFAULT_READER_TIMEOUT,
    ) -> None:
        require_instance("lm", lm, LanguageModel)
        slots = as_integer("slots", slots, 1, InputError, maximum=MOST_SLOTS)
        self.max_waiting = as_integer("max_waiting", max_waiting, 0, InputError)
        quantum = as_integer("quantum", quantum, 1, InputError)
        largest = lm.bundle.manifest.lambda_config.chunk_size
        chunk = (
            largest if chunk_size is None else as_integer("chunk_size", chunk_size, 1, InputError)
        )
        patience = math.inf
        if reader_timeout is not None:
            patience = as_number("reader_timeout", reader_timeout, InputError)
            if patience < 0:
                raise InputError(f"reader_timeout={patience}: must be seconds, at least 0")
        self.lm, self.slots = lm, slots
        self._most = self.max_waiting + slots
        pool = SlotPool(lm, slots, min(chunk, largest))
        self._loop = EngineLoop(pool, Scheduler(slots, quantum), self._most)
        self._acceptor = Acceptor(lm, self._loop.call, patience)
        # Nobody waits for the thread then: it might be the one that drops the last stream.
        weakref.finalize(self, self._loop.stop).atexit = False
        self._loop.start()

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
        if n > self._most:
            raise InputError(f"n={n}: this engine runs and holds at most {self._most} requests")
        sequences = self._acceptor.accepted(request, n, ends_at)
        streams = [TokenStream(sequence.mailbox, self) for sequence in sequences]
        self._loop.give(sequences)
        return streams

    def stats(self) -> EngineStats:
        """Return the engine's counts; cheap."""
        turns, scheduler = self._loop.turns, self._loop.turns.scheduler
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
            waiting=max(self._loop.num_pending - active, 0),
            parked=len(parked),
            prompt_tokens=turns.prompt_tokens,
            new_tokens=turns.new_tokens,
            steps=turns.steps,
            step_seconds=turns.step_seconds,
            cache_bytes=turns.pool.nbytes,
            parked_bytes=sum(snapshot.nbytes for snapshot in parked),
            healthy=self._loop.is_healthy,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until the ones there are have ended.

        Args:
            timeout: seconds to wait; None waits for as long as they take.

        Returns:
            Whether all have ended.

        Raises:
            InputError: seconds that are none.
            SessionError: a function that the engine's thread calls cannot wait for it.
        """
        if timeout is not None:
            timeout = min(as_number("timeout", timeout, InputError), threading.TIMEOUT_MAX)
        return self._loop.drain(timeout)

    def close(self) -> None:
        """End all requests with "closed", and the thread."""
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
