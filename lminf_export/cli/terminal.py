"""Printing in any encoding of the terminal, and the last words of a command that is stopped."""

from __future__ import annotations

import codecs
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

EXIT_INTERRUPTED = 130

_ERRORS = "lminf_readable"
# Signs of our own texts, for terminals that lack them.
_PLAIN = {
    "Λ": "Lambda", "×": "x", "±": "+-", "…": "...", "–": "-", "→": "->", "≥": ">=", "≤": "<=",
    "│": "|", "─": "-", "�": "?",
}  # fmt: skip


def readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Stand in for characters that an encoding lacks: plain signs for ours, else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = _PLAIN.get(error.object[error.start])
    if plain is not None:
        return plain, error.start + 1
    one = UnicodeEncodeError(
        error.encoding, error.object, error.start, error.start + 1, error.reason
    )
    return codecs.backslashreplace_errors(one)


def make_streams_safe() -> None:
    """Let no character that stdout or stderr cannot show, and no closed stream, end a program."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    codecs.register_error(_ERRORS, readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def echo_json(content: Any) -> None:
    """Print JSON; in ASCII where stdout has no Unicode encoding."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    unicode = encoding.replace("_", "-").startswith("utf")
    click.echo(json.dumps(content, indent=1, ensure_ascii=not unicode))


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


class HeldInterrupt:
    """A context in which Ctrl-C can be held back for a moment; a second one comes through.

    It does nothing outside of the main thread, which no Ctrl-C reaches.
    """

    def __init__(self) -> None:
        self._holds, self._came = False, False
        self._before: Any = None

    def __enter__(self) -> HeldInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

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
