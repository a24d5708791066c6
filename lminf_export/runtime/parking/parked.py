"""A parked session as a store had it, and the names, numbers and marks that sessions may have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from secrets import token_hex

from lminf_export.errors import InputError, shown
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.snapshot import Snapshot

MOST_TURN = 10**12 - 1
_LONGEST_NAME = 4096
_MARK = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Parked:
    """A session as a store had it.

    Attributes:
        turn: its number; the next one to save is one more.
        snapshot: of one stream.
        written: Unix time at which it was saved.
        mark: what tells it from another turn of the same number.
    """

    turn: int
    snapshot: Snapshot
    written: float
    mark: str = ""


def new_mark() -> str:
    """Return a random mark of a turn, which no other has."""
    return token_hex(8)


def checked_name(name: str) -> str:
    """Return a session's name.

    Raises:
        InputError: no text, none at all, or too long a one.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        raise InputError(f"name={shown(name)}: must be text of 1 … {_LONGEST_NAME} characters")
    return name


def checked_turn(turn: int) -> int:
    """Return the number of a turn.

    Raises:
        InputError: no integer, or one out of range.
    """
    return as_integer("turn", turn, 1, InputError, maximum=MOST_TURN)


def checked_mark(mark: str) -> str:
    """Return the mark of a turn.

    Raises:
        InputError: none that `new_mark` makes.
    """
    if not isinstance(mark, str) or not _MARK.fullmatch(mark):
        raise InputError(f"mark={shown(mark)}: must be 16 hexadecimal digits")
    return mark
