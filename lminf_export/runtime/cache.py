"""What a stream leaves behind between steps: how far it is, and caches of bounded size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lminf_export.operator.graph_contract import GraphContract

# A ring is bound no larger than needed so far: attention reads all of it at every step.
GROWTH = 1.25
GRANULE = 64


class State:
    """Where a batch of independent streams stands; made by `LanguageModel.new_state`.

    A session keeps its caches in a subclass. `capacities` says how many slots of each ring
    are bound: rings of equal full capacity C share one number, which is at most C.

    Args:
        contract: the graph's, with its caches.
        batch_size: B, streams side by side.
        capacities: full capacity → slots bound at the start.
    """

    def __init__(
        self, contract: GraphContract, batch_size: int, capacities: Mapping[int, int]
    ) -> None:
        self.contract = contract
        self.batch_size = batch_size
        self.capacities = dict(capacities)
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
        self._past_length += new_length
        self._furthest = max(self._past_length.tolist())


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
