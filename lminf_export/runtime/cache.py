"""The state of a batch of streams between steps: their lengths, and caches of bounded size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lminf_export.errors import SessionError
from lminf_export.operator.bindings import BATCH
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.runtime.snapshot import Snapshot, random_cache

# A ring is bound only as large as its tokens need: attention reads all of it at every step.
GROWTH = 1.25
GRANULE = 64


class State:
    """Lengths and caches of a batch of independent streams; made by `LanguageModel.new_state`.

    A session keeps its caches in a subclass. `capacities` says how many slots of each ring
    are bound: rings of equal full capacity C share one number, which is at most C.

    Args:
        contract: the graph's, with its caches.
        batch_size: B, streams side by side.
        capacities: full capacity → slots bound at the start.

    Attributes:
        run_seconds: time spent inside the engine's runs since the state was made.
    """

    def __init__(
        self, contract: GraphContract, batch_size: int, capacities: Mapping[int, int]
    ) -> None:
        self.contract = contract
        self.batch_size = batch_size
        self.capacities = dict(capacities)
        self.run_seconds = 0.0
        # Bound to the graph as it is: only ever changed in place.
        self._past_length = np.zeros(batch_size, np.int64)
        self._furthest = 0

    @property
    def past_length(self) -> np.ndarray:
        """(B,) int64, a copy: tokens each stream has seen."""
        return self._past_length.copy()

    @property
    def furthest(self) -> int:
        """Tokens the longest stream has seen."""
        return self._furthest

    @property
    def nbytes(self) -> int:
        """Bytes of the caches bound now."""
        return self.contract.cache_bytes(self.capacities) * self.batch_size

    @property
    def max_nbytes(self) -> int:
        """Bytes of the caches when every ring is full; they never take more."""
        return self.contract.cache_bytes() * self.batch_size

    def advance(self, new_length: np.ndarray) -> None:
        """Count the real tokens (B,) of a step that has succeeded."""
        self._move_to(self._past_length + new_length)

    def snapshot(self) -> Snapshot:
        """See `Session.snapshot`."""
        return Snapshot(self.contract, self.past_length, self._read_caches())

    def restore(self, snapshot: Snapshot) -> None:
        """See `Session.restore`."""
        if snapshot.contract != self.contract:
            raise SessionError(
                "this snapshot is of another bundle: its layers, element types or vocabulary "
                "differ; restore it in a state of the bundle it was taken from"
            )
        if snapshot.batch_size != self.batch_size:
            raise SessionError(
                f"this snapshot has {snapshot.batch_size} streams, the state has "
                f"{self.batch_size}; make a state of as many, or choose some with Snapshot.rows"
            )
        self._bind(snapshot.capacities)
        self._write_caches(snapshot.caches)
        self._move_to(snapshot.past_length)

    def stand_at(self, position: int | np.ndarray) -> None:
        """See `Session.stand_at`."""
        lengths = np.broadcast_to(np.asarray(position, np.int64), self._past_length.shape)
        self._reserve(int(lengths.max()) + 1)
        self._move_to(lengths)

    def fill(self, rng: np.random.Generator) -> None:
        """See `Session.fill`."""
        sizes = {**self.contract.ring_sizes(self.capacities), BATCH: self.batch_size}
        self._write_caches(
            {
                spec.name: random_cache(rng, spec.sized(sizes), spec.dtype)
                for spec in self.contract.caches(present=False)
            }
        )

    def ring_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return copies of rows that the rings still hold.

        Args:
            name: the graph's input, of a ring or its scales.
            start: position of the first token.
            stop: behind that of the last.

        Returns:
            (B, G, stop − start, row).
        """
        raise NotImplementedError

    def _move_to(self, past_length: np.ndarray) -> None:
        self._past_length[...] = past_length
        self._furthest = max(self._past_length.tolist())

    def _reserve(self, needed: int) -> None:
        """Bind enough slots for positions 0 … needed − 1; caches keep their tokens."""

    def _bind(self, capacities: Mapping[int, int]) -> None:
        """Bind rings of at least these slots; the content of the caches is lost."""

    def _read_caches(self) -> dict[str, np.ndarray]:
        """Return copies of the caches by input name, in main memory."""
        raise NotImplementedError

    def _write_caches(self, caches: Mapping[str, np.ndarray]) -> None:
        """Replace the content of the caches; slots behind a shorter ring become zeros."""
        raise NotImplementedError


def grown_capacity(bound: int, full: int, needed: int) -> int:
    """Return how many slots to bind so that positions 0 … needed − 1 have one each.

    Until a ring is bound in full nothing may wrap, padding included. Growth is geometric, so
    a stream copies each key a bounded number of times; it stops at the full capacity.

    Args:
        bound: slots bound now.
        full: C, slots of the full ring.
        needed: past_length + S of the longest stream.
    """
    if needed <= bound or bound == full:
        return bound
    wanted = max(needed, int(bound * GROWTH))
    return min(full, -(-wanted // GRANULE) * GRANULE)
