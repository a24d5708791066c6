"""Objects of bytes in a store that several machines share: a folder, or a URL that fsspec knows.

An object is named by a key and a turn. It is created as a whole or not at all, and never
replaced: of two that create the same turn, one fails. So a store needs no lock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

# Beyond any count of answers, and all of one length.
TURN = re.compile(r"[0-9]{12}")
KEY = re.compile(r"[0-9a-f]{64}")


def turn_name(turn: int) -> str:
    """Return the last part of an object's name."""
    return f"{turn:012d}"


@dataclass(frozen=True, order=True)
class Stored:
    """An object that is there.

    Attributes:
        turn: of its key.
        nbytes: bytes.
    """

    turn: int
    nbytes: int


class Objects(Protocol):
    """A store of objects; safe in any thread. What fails raises `ParkingError`."""

    def turns(self, key: str) -> list[Stored]:
        """Return what there is of a key, in order."""

    def read(self, key: str, found: Stored) -> bytes | None:
        """Return an object's bytes, one more than it had at most; None if it is gone."""

    def create(self, key: str, turn: int, content: bytes) -> None:
        """Create an object, which is stored when this returns.

        Raises:
            StaleTurnError: there is one.
        """

    def remove(self, key: str, turn: int) -> None:
        """Remove an object that may be gone already."""

    def remove_older(self, seconds: float) -> int:
        """Remove objects that were created longer ago than that; return how many."""
