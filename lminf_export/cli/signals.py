"""Commands that are stopped: what they keep, and their last words."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lminf_export.cli.terminal import say_if_heard

EXIT_INTERRUPTED = 130
# Seconds within which signals count as one.
_TOGETHER = 1.0

# Whoever stops a program sends one of these; Windows has no SIGHUP.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@contextmanager
def when_interrupted(kept: Callable[[], str]) -> Iterator[None]:
    """End with 130 on Ctrl-C, after a line that says what was kept.

    Args:
        kept: returns the line; called when the interruption comes.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end(kept)


def saved_however_it_ends(
    work: Callable[[], None], save: Callable[[], object], kept: Callable[[], str]
) -> None:
    """Work, and save at the end, also where a signal, or a stream or disk that fails, brings it.

    Ctrl-C, SIGTERM and SIGHUP end with 130, after a line that says what was kept; others that come
    meanwhile are ignored. An error of the system, such as that of a terminal that was closed, goes
    on when all is saved. A context would not do: a signal may come while it is left.

    Args:
        work: to be done.
        save: called at its end, once.
        kept: returns the line; called behind `save`.
    """
    handlers, is_saved = _Handlers(lambda *_: _ONCE.interrupt()), False

    def end() -> None:
        nonlocal is_saved
        handlers.ignore()
        if not is_saved:
            save()
            is_saved = True

    try:
        try:
            work()
            end()
        except OSError:
            end()
            raise
    except KeyboardInterrupt:
        end()
        _end(kept)
    finally:
        handlers.restore()


def ignore_signals() -> None:
    """Let a program that has been interrupted end in peace."""
    _Handlers(signal.SIG_IGN)


def begin() -> None:
    """Forget the last words of a command that this process has run before."""
    _ONCE.begin()


def say_interrupted() -> None:
    """Say that a command was interrupted, unless its last words have just said so.

    A signal that comes with those it ends by may find their handlers gone already.
    """
    if not _ONCE.is_over:
        say_if_heard("\ninterrupted")


def _end(kept: Callable[[], str]) -> NoReturn:
    say_if_heard("")
    say_if_heard(f"interrupted: {kept()}")
    _ONCE.end()
    raise SystemExit(EXIT_INTERRUPTED) from None


class HeldInterrupt:
    """A context in which Ctrl-C can be held back for a moment; a second one comes through.

    So can the other signals that `saved_however_it_ends` takes.
    """

    def __init__(self) -> None:
        self._holds = False
        self._came: float | None = None
        self._handlers: _Handlers | None = None

    def __enter__(self) -> HeldInterrupt:
        self._handlers = _Handlers(self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._handlers is not None
        self._handlers.restore()

    def hold(self) -> None:
        """Hold Ctrl-C back from now on."""
        self._holds = True

    def release(self) -> None:
        """Let a Ctrl-C that came meanwhile through.

        Raises:
            KeyboardInterrupt: if one came.
        """
        if self._came is not None:
            _ONCE.interrupt()

    def _interrupt(self, *_: object) -> None:
        now = time.monotonic()
        if not self._holds or (self._came is not None and now > self._came + _TOGETHER):
            _ONCE.interrupt()
        elif self._came is None:
            self._came = now


class _Once:
    """Interrupts once for signals that come together: a terminal that closes sends several."""

    def __init__(self) -> None:
        self._latest = self._ended = -math.inf

    @property
    def is_over(self) -> bool:
        """Whether what the last interruption ended has just said its last words."""
        return time.monotonic() <= self._ended + _TOGETHER

    def begin(self) -> None:
        """Note that a command begins."""
        self._ended = -math.inf

    def end(self) -> None:
        """Note that the last words are said."""
        self._ended = time.monotonic()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt, unless that has just been done."""
        now = time.monotonic()
        if now > self._latest + _TOGETHER:
            self._latest = now
            raise KeyboardInterrupt


_ONCE = _Once()


class _Handlers:
    """Handlers of the signals that stop a program; none outside of the main thread.

    Signals that whoever started the program has it ignore, as nohup does, stay ignored.

    Args:
        handler: of all of them.
    """

    def __init__(self, handler: Callable[..., Any] | signal.Handlers) -> None:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, handler)

    def ignore(self) -> None:
        """Let no signal come through from now on."""
        for number in self._before:
            signal.signal(number, lambda *_: None)

    def restore(self) -> None:
        """Put those from before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
