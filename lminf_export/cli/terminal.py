"""Printing in any encoding of the terminal."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from contextlib import suppress
from typing import Any

import click

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


def say_if_heard(text: str) -> None:
    """Print a line on stderr; where that has been closed, nobody is there to read it."""
    with suppress(OSError):
        click.echo(text, err=True)


def end_stdout(text: str) -> None:
    """Print the last of an interrupted output; whoever read it may be gone, too."""
    try:
        click.echo(text, nl=False)
        sys.stdout.flush()
    except OSError:
        close_stdout()


def close_stdout() -> None:
    """Let the interpreter's last flush go nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no file, as in tests
        return


def echo_json(content: Any, *, allow_nan: bool = True) -> None:
    """Print JSON, see `json_text`."""
    click.echo(json_text(content, allow_nan=allow_nan))


def json_text(content: Any, *, allow_nan: bool = True) -> str:
    """Return JSON as stdout can show it: in ASCII where it has no Unicode encoding.

    Args:
        content: of values that JSON has.
        allow_nan: whether infinity and NaN are written, which not every reader knows.

    Raises:
        ValueError: one of these is in it, and not allowed.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    unicode = encoding.replace("_", "-").startswith("utf")
    return json.dumps(content, indent=1, ensure_ascii=not unicode, allow_nan=allow_nan)
