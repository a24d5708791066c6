"""Errors that are no user's mistake: one line, a kept traceback, an exit code of their own."""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
from types import TracebackType

import click

from lminf_export.cli.terminal import say_if_heard

EXIT_INTERNAL = 3
# Ways in which click ends a command; they are no errors of this program.
_CLICK_ENDS = (click.ClickException, click.exceptions.Exit, click.Abort)
_MESSAGE_LENGTH = 120


class InternalErrors:
    """Ends the program with 3 if an exception leaves the context that no command foresees.

    One line on stderr names the exception and the file that holds its traceback; with -v the
    traceback is printed, too.
    """

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, _CLICK_ENDS):
            return
        text = "".join(traceback.format_exception(kind, error, trace))
        if logging.getLogger("lminf_export").isEnabledFor(logging.INFO):
            sys.stderr.write(text)
        reason = " ".join(str(error).split())[:_MESSAGE_LENGTH]
        name = type(error).__name__
        say_if_heard(f"internal error: {name}{': ' if reason else ''}{reason} ({_kept(text)})")
        raise SystemExit(EXIT_INTERNAL) from None


def _kept(text: str) -> str:
    """Write a traceback to a file that stays; say where it is, or how to see it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lminf-", suffix=".traceback", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return "-v shows the traceback"
    return f"traceback: {file.name}"
