"""Who has a slot, in which row of the batch, and who reads next: no tensors, no threads, no text.

Rows 0 … n − 1 decode together, without a gap, so that an idle slot costs a step nothing; a
sequence that still reads its prompt has a row behind them. What must move for that is returned
as copies and swaps of rows, which the caller carries out at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol


class Reader(Protocol):
    """A sequence, as far as a scheduler has to know it."""

    @property
    def num_unread(self) -> int:
        """Tokens of the prompt that have not been read."""
        ...


@dataclass(frozen=True)
class Move:
    """One change of rows: `source` is copied over `target`, or both change places."""

    kind: Literal["copy", "swap"]
    source: int
    target: int


@dataclass
class _Seat:
    """A row that is taken.

    Attributes:
        sequence: by whom.
        passed_over: turns in which another one read, since this one read last.
        begun: steps that had been counted when it began to decode.
    """

    sequence: Reader
    passed_over: int = 0
    begun: int = 0


class Scheduler:
    """Gives rows to sequences in the order they came.

    Among prompts the one with least to read comes first, so that the mean time to a first token
    is short; one that was passed over 2 × slots times comes before all others.

    Args:
        slots: rows.
        quantum: tokens after which a sequence has to give its row to one that waits.
    """

    def __init__(self, slots: int, quantum: int) -> None:
        self.slots = slots
        self.quantum = quantum
        self.waiting: deque[Reader] = deque()
        self._decoding: list[_Seat] = []
        self._steps = 0
        self._reading: dict[int, _Seat] = {}

    @property
    def num_decoding(self) -> int:
        """n: rows 0 … n − 1 decode."""
        return len(self._decoding)

    @property
    def num_reading(self) -> int:
        """Sequences that have a row and still read."""
        return len(self._reading)

    @property
    def has_free_row(self) -> bool:
        """Whether a sequence could be given a row."""
        return len(self._decoding) + len(self._reading) < self.slots

    def decoding(self) -> list[Reader]:
        """Return who decodes, in the order of the rows."""
        return [seat.sequence for seat in self._decoding]

    def row_of(self, sequence: Reader) -> int | None:
        """Return a sequence's row, if it has one."""
        for row, seat in enumerate(self._decoding):
            if seat.sequence is sequence:
                return row
        return next((row for row, seat in self._reading.items() if seat.sequence is sequence), None)

    def admit(self) -> tuple[Reader, int] | None:
        """Give a row to whoever has waited longest; None if nobody waits or no row is free."""
        if not self.waiting or not self.has_free_row:
            return None
        sequence = self.waiting.popleft()
        row = next(
            row for row in range(len(self._decoding), self.slots) if row not in self._reading
        )
        self._reading[row] = _Seat(sequence)
        return sequence, row

    def next_reader(self) -> tuple[Reader, int] | None:
        """Return who reads a piece of its prompt in this turn, and its row."""
        if not self._reading:
            return None
        late = [row for row, s in self._reading.items() if s.passed_over >= 2 * self.slots]
        rows = late or list(self._reading)
        chosen = min(rows, key=lambda row: self._reading[row].sequence.num_unread)
        for row, seat in self._reading.items():
            seat.passed_over = 0 if row == chosen else seat.passed_over + 1
        return self._reading[chosen].sequence, chosen

    def begin_decoding(self, sequence: Reader) -> list[Move]:
        """Let a sequence that has read its prompt decode with the others."""
        row, target = self._reading_row(sequence), len(self._decoding)
        moves = []
        seat = self._reading.pop(row)
        if row != target:
            other = self._reading.pop(target, None)
            if other is not None:
                self._reading[row] = other
            moves.append(Move("copy" if other is None else "swap", row, target))
        seat.begun = self._steps
        self._decoding.append(seat)
        return moves

    def count_step(self) -> None:
        """Count a token for every row that decodes."""
        self._steps += 1

    def release(self, sequence: Reader) -> list[Move]:
        """Take a sequence's row away; the last row that decodes closes the gap."""
        row = self.row_of(sequence)
        assert row is not None, "only a sequence with a row gives one back"
        if row in self._reading:
            del self._reading[row]
            return []
        last = self._decoding.pop()
        if row == len(self._decoding):
            return []
        self._decoding[row] = last
        return [Move("copy", len(self._decoding), row)]

    def overdue(self) -> Reader | None:
        """Return who has to make room for a sequence that waits, None if nobody has."""
        if not self.waiting or self.has_free_row or not self._decoding:
            return None
        seat = min(self._decoding, key=lambda seat: seat.begun)
        return seat.sequence if self._steps - seat.begun >= self.quantum else None

    def clear(self) -> None:
        """Forget everybody."""
        self.waiting.clear()
        self._decoding.clear()
        self._reading.clear()

    def _reading_row(self, sequence: Reader) -> int:
        return next(row for row, seat in self._reading.items() if seat.sequence is sequence)
