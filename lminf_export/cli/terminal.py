"""Printing in any encoding of the terminal."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
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


def echo_json(content: Any) -> None:
    """Print JSON; in ASCII where stdout has no Unicode encoding."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    unicode = encoding.replace("_", "-").startswith("utf")
    click.echo(json.dumps(content, indent=1, ensure_ascii=not unicode))
