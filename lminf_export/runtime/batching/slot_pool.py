"""The slots of an engine: one state whose streams are stepped over, moved and kept one by one."""

from __future__ import annotations

import numpy as np

from lminf_export.runtime.batching.scheduler import Move
from lminf_export.runtime.cache import State
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.memory import require_memory
from lminf_export.runtime.snapshot import Snapshot


class SlotPool:
    """Slots over one session; only one thread may use it.

    Args:
        lm: whose session runs.
        slots: streams side by side.
        chunk_size: tokens that one step reads at most.

    Raises:
        SessionError: the caches of so many streams are more than the memory holds.
    """

    def __init__(self, lm: LanguageModel, slots: int, chunk_size: int) -> None:
        require_memory(lm.bundle.manifest, lm.session, slots)
        self._session = lm.session
        self._chunk_size = chunk_size
        self._state = lm.session.new_state(slots, full=True)
        self._ones = np.ones(slots, np.int64)
        self._first = np.zeros((slots, 1), np.int64)
        # Ids of the tokens that the next step reads, a row each.
        self.latest = np.zeros((slots, 1), np.int64)
        self._rows = [self._state.rows(row, row + 1) for row in range(slots)]
        self._prefixes = [self._state.rows(0, count) for count in range(1, slots + 1)]
        # Where two rows change places, one of them waits here: it must not lack memory then.
        contract = lm.bundle.manifest.contract
        full = np.array([contract.ring_capacities[-1]])
        self._spare = Snapshot.begin(contract, full, lm.state_id, None)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots' caches."""
        return self._state.nbytes

    def decode(self, count: int) -> np.ndarray:
        """Read the latest token of rows 0 … count − 1.

        Returns:
            (count, V) float32 logits, valid until the next step.

        Raises:
            SessionError: the step failed; no row has moved on.
        """
        view, ones = self._prefixes[count - 1], self._ones[:count]
        logits = self._session.step(view, self.latest[:count], ones, self._first[:count])
        view.advance(ones)
        return logits[:, 0]

    def piece(self, row: int, num_unread: int) -> int:
        """Return how many tokens of a prompt the next step of a row reads."""
        return min(num_unread, self._chunk_size, self._session.step_limit(self._view(row)))

    def read(self, row: int, ids: np.ndarray, *, wanted: bool) -> np.ndarray | None:
        """Read ids (S,) into a row; return (V,) logits behind the last one if they are wanted.

        Raises:
            SessionError: the step failed; the row has not moved on.
        """
        view = self._view(row)
        # The row is the last one of the view, and most often the only one.
        rows = view.batch_size
        padded = np.zeros((rows, len(ids)), np.int64)
        padded[-1] = ids
        lengths = np.zeros(rows, np.int64)
        lengths[-1] = len(ids)
        index = np.full((rows, int(wanted)), len(ids) - 1, np.int64)
        index[:-1] = 0
        logits = self._session.step(view, padded, lengths, index)
        view.advance(lengths)
        return logits[-1, 0] if wanted else None

    def _view(self, row: int) -> State:
        """Return what is stepped so that a row reads: itself, or also the rows before it."""
        alone = self._rows[row]
        return alone if alone.can_step else self._prefixes[row]

    def begin(self, row: int, start: Snapshot | None) -> None:
        """Let a row be a new stream, or one that goes on from a snapshot.

        Raises:
            SessionError: the snapshot is of another bundle, or damaged.
        """
        if start is None:
            self._rows[row].stand_at(0)
        else:
            self._rows[row].restore(start)

    def position(self, row: int) -> int:
        """Tokens that a row has read."""
        return self._rows[row].furthest

    def snapshot(self, row: int) -> Snapshot:
        """Return a copy of one row.

        Raises:
            SessionError: the memory is short.
        """
        return self._rows[row].snapshot()

    def clear(self, row: int) -> None:
        """Forget a row whose content may be damaged."""
        self._rows[row].reset()

    def move(self, move: Move) -> None:
        """Carry out a move, with the rows' latest tokens."""
        latest = self.latest
        if move.kind == "copy":
            self._state.copy_row(move.source, move.target)
            latest[move.target] = latest[move.source]
            return
        self._spare = self._rows[move.target].snapshot(into=self._spare)
        self._state.copy_row(move.source, move.target)
        self._rows[move.source].restore(self._spare)
        latest[[move.source, move.target]] = latest[[move.target, move.source]]
