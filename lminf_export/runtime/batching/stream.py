"""The stream of tokens that a caller holds of a request, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from lminf_export.errors import InputError, LminfError, require_instance, shown
from lminf_export.runtime.batching.request import FinishReason, Kept, Token
from lminf_export.runtime.batching.threads import require_other_thread
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.unpicklable import Unpicklable

logger = logging.getLogger(__name__)


class Mailbox:
    """Where the engine puts a request's tokens; it never waits for whoever takes them out.

    Only the engine's thread calls `put` and `end`; one reader at a time takes.

    Args:
        on_call: called, from any thread, when the reader wants the engine's attention: it has
            cancelled, or it has emptied the mailbox of a request that had to pause.

    Attributes:
        items: tokens that nobody has taken: a token id, or a Token where there is more to say.
        finish_reason: why the request ended; None while it runs.
        error: what ended it, or None.
        kept: the state at the end, if it was asked for.
        checkpoint: the state within the prompt, if it was asked for.
        cancelled: whether its caller wants it ended.
        is_full: whether the request pauses until its reader has taken some.
        submitted: when it came, of `time.perf_counter`, as the other times.
        first_token_at: when its first token was chosen.
        finished_at: when it ended.
        num_prompt_tokens: tokens it gave to read.
        num_tokens: tokens chosen so far.
    """

    def __init__(self, num_prompt_tokens: int, on_call: Callable[[], None]) -> None:
        self.items: deque[int | Token] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: LminfError | None = None
        self.kept: Kept | None = None
        self.checkpoint: Snapshot | None = None
        self.cancelled = False
        self.is_full = False
        self.submitted = time.perf_counter()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self._call = on_call
        # One reader at most, and what wakes it: `setdefault` and `pop` are one step each.
        self._waiting: dict[str, tuple[object, Callable[[], None]]] = {}

    @property
    def ended(self) -> bool:
        """Whether no more tokens come."""
        return self.finished_at is not None

    def put(self, item: int | Token) -> Callable[[], None] | None:
        """Add a token; return what wakes the reader, if it waits."""
        self.items.append(item)
        count = self.num_tokens
        self.num_tokens = count + 1
        if not count:
            self.first_token_at = time.perf_counter()
        waiting = self._waiting
        return waiting.pop("", _NOBODY)[1] if waiting else None

    def end(
        self, reason: FinishReason | None, error: LminfError | None = None
    ) -> Callable[[], None] | None:
        """Let no more tokens come; return what wakes the reader, if it waits."""
        self.finish_reason, self.error = reason, error
        self.finished_at = time.perf_counter()
        return self._waiting.pop("", _NOBODY)[1]

    def cancel(self) -> None:
        """Ask the engine to end the request."""
        if not self.ended and not self.cancelled:
            self.cancelled = True
            self._call()

    def move_to(self, target: deque[int | Token]) -> None:
        """Take all tokens that are there, in one call that no interrupt comes into."""
        try:
            target.extend(iter(self.items.popleft, None))
        except IndexError:  # none is left
            if self.is_full:
                self._call()

    def wait(self, wake: Callable[[], None], reader: object) -> bool:
        """Have a function called, once, when something comes; False if something is there.

        Args:
            wake: called then; another function of the same reader is not called any more.
            reader: who waits: a thread's number, or a task.

        Raises:
            InputError: another reader waits.
        """
        waits = reader, wake
        found = self._waiting.setdefault("", waits)
        if found is not waits:
            if found[0] != reader:
                raise InputError(
                    "another thread or task waits for this stream's tokens, and each of them goes "
                    "to one reader only; let one read, or submit a request for each"
                )
            self._waiting[""] = waits
        # What came before the reader stood there woke nobody.
        if not self.items and not self.ended:
            return True
        self.stop_waiting(reader)
        return False

    def stop_waiting(self, reader: object) -> None:
        """Have nothing called for a reader that waits no more."""
        if self._waiting.get("", _NOBODY)[0] == reader:
            self._waiting.pop("", None)


# Where no reader waits.
_NOBODY: tuple[object, None] = (None, None)


class TokenStream(Unpicklable):
    """The tokens of one request as they are chosen; for one reader, in a thread or in asyncio.

    A stream that nobody holds any more cancels its request. `Engine.submit` makes streams.

    Args:
        mailbox: that the engine fills.
        engine: which is not closed for want of a holder while there is the stream.
    """

    in_its_place = "send its tokens"

    def __init__(self, mailbox: Mailbox, engine: object = None) -> None:
        require_instance("mailbox", mailbox, Mailbox)
        self._mailbox = mailbox
        self._engine = engine
        self._taken: deque[int | Token] = deque()
        self._taking = threading.Lock()
        weakref.finalize(self, mailbox.cancel).atexit = False

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it runs, or if an error ended it."""
        return self._mailbox.finish_reason

    @property
    def error(self) -> LminfError | None:
        """The error that ended the request; reading on raises it."""
        return self._mailbox.error

    @property
    def kept(self) -> Kept | None:
        """The state at the end, if `Request.keep` asked for it and the request has begun.

        None where an error has ended it, or the engine's close.
        """
        return self._mailbox.kept

    @property
    def checkpoint(self) -> Snapshot | None:
        """The state behind `Request.checkpoint` tokens of the prompt, once they are read.

        Of continuations that share a prompt, the one that has read it has it.
        """
        return self._mailbox.checkpoint

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the request gave to read."""
        return self._mailbox.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens chosen so far, whether taken or not."""
        return self._mailbox.num_tokens

    @property
    def submitted(self) -> float:
        """When the request came, of `time.perf_counter`, as the other times."""
        return self._mailbox.submitted

    @property
    def first_token_at(self) -> float | None:
        """When the first token was chosen."""
        return self._mailbox.first_token_at

    @property
    def finished_at(self) -> float | None:
        """When the request ended."""
        return self._mailbox.finished_at

    def cancel(self) -> None:
        """End the request before the next step; what was chosen can still be taken."""
        self._mailbox.cancel()

    def when_ready(self, wake: Callable[[], None]) -> bool:
        """Have a function called once, in another thread, when there is something to take.

        Args:
            wake: called at the next token or the end; it must be quick. An error that it raises
                is logged. A function that this thread gave before is not called any more.

        Returns:
            False if there is something now; the function is not called then.

        Raises:
            InputError: another thread or task waits already, or this is no function.
        """
        if not callable(wake):
            raise InputError(f"wake={shown(wake)}: must be a function without arguments")
        return not self._taken and self._mailbox.wait(wake, threading.get_ident())

    def take(self) -> list[Token]:
        """Return the tokens that are there, without waiting.

        Raises:
            LminfError: the request's error, once everything before it was taken.
        """
        # Looked at first: what came before the end is there when the end is.
        ended = self._mailbox.ended
        with self._taking:
            self._mailbox.move_to(self._taken)
            found = [_as_token(item) for item in list(self._taken)]
            self._taken.clear()
        if not found and ended and self._mailbox.error is not None:
            raise self._mailbox.error
        return found

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        """Return the next token, waiting for it.

        Raises:
            StopIteration: the request has ended.
            LminfError: an error has ended it.
            InputError: another thread or task waits for a token of this stream.
            SessionError: a function that an engine's thread calls cannot wait here.
        """
        while (item := self._next()) is None:
            require_other_thread("reading a stream")
            gate, reader = threading.Lock(), threading.get_ident()
            gate.acquire()
            try:
                if self._mailbox.wait(gate.release, reader):
                    gate.acquire()
            except BaseException:
                self._mailbox.stop_waiting(reader)
                raise
        if item is _END:
            raise StopIteration
        return _as_token(item)

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        """Return the next token, waiting for it; see `__next__`."""
        while (item := self._next()) is None:
            loop, reader = asyncio.get_running_loop(), asyncio.current_task()
            arrived: asyncio.Future[None] = loop.create_future()
            try:
                if self._mailbox.wait(LoopWaker(loop, arrived), reader):
                    await arrived
            except BaseException:
                self._mailbox.stop_waiting(reader)
                raise
        if item is _END:
            raise StopAsyncIteration
        return _as_token(item)

    def _next(self) -> int | Token | None:
        """Take a token that is there; None if there is none yet, _END if none will come."""
        taken, mailbox = self._taken, self._mailbox
        # Looked at first: what came before the end is there when the end is.
        ended = mailbox.finished_at is not None
        if not taken:
            mailbox.move_to(taken)
        try:
            return taken.popleft()
        except IndexError:  # nothing is there, or another reader was faster
            found = _END if ended else None
        if ended and mailbox.error is not None:
            raise mailbox.error
        return found


# No id of a token.
_END = -1


def _as_token(item: int | Token) -> Token:
    return item if isinstance(item, Token) else Token(item)


class LoopWaker:
    """Wakes a reader in an event loop; `wake_all` wakes those of one loop by one call into it.

    Args:
        loop: the reader's.
        arrived: what it awaits.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, arrived: asyncio.Future[None]) -> None:
        self.loop, self.arrived = loop, arrived

    def __call__(self) -> None:
        """Wake the reader."""
        wake_all([self])


def wake_all(wakers: list[Callable[[], None]]) -> None:
    """Wake readers: those of one event loop together."""
    loops: dict[Any, list[asyncio.Future[None]]] = {}
    for waker in wakers:
        if isinstance(waker, LoopWaker):
            loops.setdefault(waker.loop, []).append(waker.arrived)
            continue
        try:
            waker()
        except BaseException:
            # A caller's function, also one that would end the thread: other readers wait behind it.
            logger.exception("a function given to TokenStream.when_ready has failed")
    for loop, futures in loops.items():
        # A loop that has been closed has nobody left who waits.
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(_set_all, futures)
            except RuntimeError:
                if not loop.is_closed():
                    raise


def _set_all(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
