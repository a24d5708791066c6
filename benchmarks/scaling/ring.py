"""Consistent hashing with bounded loads: a session's server, and who takes over.

Each host has many points on a ring of 64-bit numbers; a session belongs to the host of the next
point behind its own. Source: V. Mirrokni, M. Thorup, M. Zadimoghaddam, "Consistent Hashing with
Bounded Loads" (2018), arXiv 1608.01350.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

_MASK = (1 << 64) - 1


def mixed(number: int) -> int:
    """Return 64 bits that look random, the same for the same number (SplitMix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


class Ring:
    """Points of hosts 0 … n − 1.

    Args:
        hosts: n.
        points: of each.
    """

    def __init__(self, hosts: int, points: int) -> None:
        placed = sorted(
            (mixed(mixed(host + 1) + point), host)
            for host in range(hosts)
            for point in range(points)
        )
        self._places = [place for place, _ in placed]
        self._owners = [host for _, host in placed]

    def home(self, session: int) -> int:
        """Return the host that a session belongs to while all are there."""
        return self._owners[self._index(session)]

    def hosts(self, session: int) -> Iterator[int]:
        """Yield every host once, in the order in which they take a session over."""
        start = self._index(session)
        seen = set()
        for step in range(len(self._owners)):
            owner = self._owners[(start + step) % len(self._owners)]
            if owner not in seen:
                seen.add(owner)
                yield owner

    def _index(self, session: int) -> int:
        place = bisect_left(self._places, mixed(session ^ 0x5DEECE66D))
        return place % len(self._places)
