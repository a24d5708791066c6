"""The hash of a sequence of bytes that grows at its end, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# A Mersenne prime: two sequences of one length share a value once in 2⁵²¹.
_PRIME = (1 << 521) - 1
_DIGITS = 132


@dataclass(frozen=True)
class RollingHash:
    """The bytes of a sequence: their number, and the number they spell modulo a prime.

    Unlike a digest it can be stored, and goes on from there.

    Attributes:
        length: bytes.
        value: 0 … 2⁵²¹ − 2.
    """

    length: int = 0
    value: int = 0

    def then(self, data: bytes) -> RollingHash:
        """Return the hash with more bytes at the end."""
        shift = pow(2, 8 * len(data), _PRIME)
        number = int.from_bytes(data, "big") % _PRIME
        return RollingHash(self.length + len(data), (self.value * shift + number) % _PRIME)

    def begins(self, data: bytes) -> bool:
        """Tell whether bytes begin with exactly these."""
        return len(data) >= self.length and RollingHash().then(data[: self.length]) == self

    @property
    def digits(self) -> str:
        """The value as hexadecimal digits."""
        return f"{self.value:0{_DIGITS}x}"


def ids_bytes(ids: Sequence[int] | np.ndarray) -> bytes:
    """Return token ids as bytes, four for each."""
    return np.asarray(ids, "<i4").tobytes()


def message_bytes(message: Mapping[str, str]) -> bytes:
    """Return a message as bytes that no other message has."""
    return json.dumps([message["role"], message["content"]]).encode("ascii") + b"\n"


def messages_bytes(messages: Iterable[Mapping[str, str]]) -> bytes:
    """Return messages as bytes; those of the first of them begin those of all."""
    return b"".join(message_bytes(message) for message in messages)
