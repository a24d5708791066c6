"""Commands that are stopped: what they keep, and their last words."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

EXIT_INTERRUPTED = 130

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
        click.echo(err=True)
        click.echo(f"interrupted: {kept()}", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


@contextmanager
def saved_however_it_ends(save: Callable[[], object]) -> Iterator[None]:
    """Save at the end, at Ctrl-C, SIGTERM, SIGHUP, and where the reader of stdout goes.

    Args:
        save: called then, before the exception goes on, which for a signal is KeyboardInterrupt.
    """
    handlers = _Handlers(signal.default_int_handler)
    try:
        try:
            yield
            save()
        except (KeyboardInterrupt, BrokenPipeError):
            save()
            raise
    finally:
        handlers.restore()


class HeldInterrupt:
    """A context in which Ctrl-C can be held back for a moment; a second one comes through.

    So can the other signals that `saved_however_it_ends` takes.
    """

    def __init__(self) -> None:
        self._holds, self._came = False, False
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
        if self._came:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        if not self._holds or self._came:
            raise KeyboardInterrupt
        self._came = True


class _Handlers:
    """Handlers of the signals that stop a program; none outside of the main thread.

    Signals that whoever started the program has it ignore, as nohup does, stay ignored.

    Args:
        handler: of all of them.
    """

    def __init__(self, handler: Callable[..., Any]) -> None:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, handler)

    def restore(self) -> None:
        """Put those from before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
