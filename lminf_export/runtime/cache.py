"""What a stream leaves behind between steps: how far it is, and caches of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lminf_export.operator.bindings import LayerSpec

# A ring is bound no larger than needed so far: attention reads all of it at every step.
GROWTH = 1.25
GRANULE = 64


class State:
    """Where a batch of independent streams stands; made by `LanguageModel.new_state`.

    A session keeps its caches in a subclass. `capacities` says how many slots of each ring
    are bound: rings of equal full capacity C share one number, which is at most C.

    Args:
        layers: the model's caches.
        batch_size: B, streams side by side.
        item_size: bytes of an element of the model's type.
        capacities: full capacity → slots bound at the start.
        kv_cache_dtype: "int8" for rings of int8; None for rings in the model's type.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        batch_size: int,
        item_size: int,
        capacities: Mapping[int, int],
        kv_cache_dtype: str | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.batch_size = batch_size
        self.item_size = item_size
        self.kv_cache_dtype = kv_cache_dtype
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
        return self._bytes(self.capacities)

    @property
    def max_nbytes(self) -> int:
        """Bytes of the caches when every ring is full; they never take more."""
        return self._bytes({})

    def advance(self, new_length: np.ndarray) -> None:
        """Count the real tokens (B,) of a step that has succeeded."""
        self._past_length += new_length
        self._furthest = max(self._past_length.tolist())

    def _bytes(self, capacities: Mapping[int, int]) -> int:
        sizes = (
            layer.cache_bytes(
                self.item_size, self.kv_cache_dtype, capacities.get(layer.ring_capacity)
            )
            for layer in self.layers
        )
        return sum(sizes) * self.batch_size


def ring_capacities(layers: Sequence[LayerSpec]) -> tuple[int, ...]:
    """Return the full capacities of a model's rings, each once."""
    return tuple(sorted({layer.ring_capacity for layer in layers}))


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
