"""Where the lines of a chat come from: a terminal with editing, or plainly from stdin."""

from __future__ import annotations

import signal
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NoReturn, Protocol

from lminf_export.cli.common import not_utf8
from lminf_export.errors import DependencyError, InputError

_PROMPT = "> "
_MOST_BYTES = 2**24


class Lines(Protocol):
    """A source of lines.

    Attributes:
        is_terminal: whether somebody types them, and can correct a mistake.
    """

    is_terminal: bool

    def read(self) -> str | None:
        """Return the next line without its end; None where there are no more."""
        ...

    def open(self) -> AbstractContextManager[None]:
        """Return the context in which lines are read and answered."""
        ...


def open_lines(commands: Iterable[str], status: Callable[[], str]) -> Lines:
    """Return the lines of a terminal, if both ends are one, else of stdin.

    Args:
        commands: words that a line may begin with, offered as completions.
        status: returns the line at the bottom of the terminal.

    Raises:
        DependencyError: the package that edits lines is missing.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TerminalLines(commands, status)
    return PlainLines()


def _end(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


class PlainLines:
    """Lines of stdin, in UTF-8."""

    is_terminal = False

    def __init__(self) -> None:
        self._count = 0

    def open(self) -> AbstractContextManager[None]:
        """See `Lines`."""
        return nullcontext()

    def read(self) -> str | None:
        """See `Lines`.

        Raises:
            InputError: a line is not UTF-8, or too long.
        """
        raw = sys.stdin.buffer.readline(_MOST_BYTES)
        if not raw:
            return None
        self._count += 1
        if len(raw) == _MOST_BYTES:
            raise InputError(f"line {self._count} of stdin has {_MOST_BYTES} bytes or more")
        try:
            return raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(not_utf8(f"line {self._count} of stdin", error)) from None


class TerminalLines:
    """Lines that somebody types, with editing, a history, and a status below."""

    is_terminal = True

    def __init__(self, commands: Iterable[str], status: Callable[[], str]) -> None:
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
        except ImportError:
            raise DependencyError(
                "lminf chat needs the package prompt_toolkit to edit lines on a terminal: "
                "pip install 'lminf-export[chat]'; lines from a pipe need none"
            ) from None
        self._session: PromptSession[str] = PromptSession(
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            bottom_toolbar=lambda: f" {status()} ",
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """See `Lines`; what is typed during an answer is not shown in it, and comes next."""
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        quiet = termios.tcgetattr(terminal)
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        quiet[3] |= termios.NOFLSH  # Ctrl-C leaves what was typed before it
        ended = signal.signal(signal.SIGTERM, _end)  # or the terminal stays as it is then
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)
            signal.signal(signal.SIGTERM, ended)

    def read(self) -> str | None:
        """See `Lines`; Ctrl-D ends, Ctrl-C raises KeyboardInterrupt."""
        try:
            return self._session.prompt(_PROMPT)
        except EOFError:
            return None
