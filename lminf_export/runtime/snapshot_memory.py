"""The memory of a snapshot's caches, and its tables, which are made once for each contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lminf_export.operator.bindings import BATCH
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.runtime.arrays import starts_together, unset_bytes
from lminf_export.tensors.dtypes import ELEMENT_TYPES


@dataclass(frozen=True)
class CacheRow:
    """One cache tensor (B, G, slots, row) of a contract.

    Attributes:
        name: of the graph's input.
        num_kv_heads: G.
        slots: C of a ring, N of sink tokens.
        in_ring: whether it is a ring or its scales.
        row: elements of a token.
        dtype: of arrays; numpy lacks bfloat16, so it is uint16.
    """

    name: str
    num_kv_heads: int
    slots: int
    in_ring: bool
    row: int
    dtype: np.dtype

    def used(self, furthest: int) -> int:
        """Return the slots that hold something of so many tokens; those of sinks count in whole."""
        return min(self.slots, furthest) if self.in_ring else self.slots


@lru_cache(maxsize=16)
def cache_table(contract: GraphContract) -> tuple[CacheRow, ...]:
    """Return the caches of a contract in the graph's order."""
    sizes = {**contract.ring_sizes(), BATCH: 0}
    rows = []
    for spec in contract.caches(present=False):
        _, heads, slots, row = spec.sized(sizes)
        in_ring = isinstance(spec.shape[2], str)
        rows.append(CacheRow(spec.name, heads, slots, in_ring, row, numpy_dtype(spec.dtype)))
    return tuple(rows)


def used_slots(contract: GraphContract, furthest: int) -> dict[str, int]:
    """Return the slots of each cache that hold something of so many tokens, by name."""
    return {row.name: row.used(furthest) for row in cache_table(contract)}


@dataclass(frozen=True)
class _Layout:
    """Where the caches of a snapshot stand in its memory: name, shape, type, first byte."""

    nbytes: int
    places: tuple[tuple[str, tuple[int, ...], np.dtype, int], ...]


@lru_cache(maxsize=64)
def _layout(contract: GraphContract, batch_size: int, furthest: int) -> _Layout:
    table = cache_table(contract)
    shapes = [
        ((batch_size, row.num_kv_heads, row.used(furthest), row.row), row.dtype) for row in table
    ]
    starts = starts_together(shapes)
    places = zip((row.name for row in table), shapes, starts, strict=False)
    return _Layout(starts[-1], tuple((name, *shape, start) for name, shape, start in places))


def most_bytes(contract: GraphContract) -> int:
    """Return the bytes of the caches of one stream that has filled them."""
    return _layout(contract, 1, contract.ring_capacities[-1]).nbytes


class OwnCaches(dict[str, np.ndarray]):
    """Caches by name that lie in a snapshot's memory.

    Args:
        memory: theirs.
    """

    def __init__(self, memory: SnapshotMemory) -> None:
        super().__init__(memory.caches)
        self.memory = memory


class SnapshotMemory:
    """Arrays for the caches of one snapshot, which a later one may write again.

    Args:
        contract: of the graph.
        batch_size: B.
        furthest: tokens of the longest stream.
        old: memory that is needed no more; what it held is lost.

    Attributes:
        arrays: by name, to be written.
        caches: the same, read-only.
        is_shared: whether another snapshot has these arrays, too; it is then not written again.

    Raises:
        SessionError: the memory is short.
    """

    def __init__(
        self, contract: GraphContract, batch_size: int, furthest: int, old: SnapshotMemory | None
    ) -> None:
        # Behind the largest ring's end more tokens use no more slots.
        layout = _layout(contract, batch_size, min(furthest, contract.ring_capacities[-1]))
        if old is not None and old._layout is layout:
            self.__dict__.update(old.__dict__)
            return
        self._layout: _Layout = layout
        self.is_shared = False
        if old is not None and old._bytes.nbytes >= layout.nbytes:
            self._bytes: np.ndarray = old._bytes
        else:
            # Not zeros: all of it is written.
            self._bytes = unset_bytes(layout.nbytes)
        self.arrays = self._arrays_over(self._bytes)
        self.caches = self._arrays_over(memoryview(self._bytes.data).toreadonly())

    def _arrays_over(self, memory: Any) -> dict[str, np.ndarray]:
        return {
            name: np.ndarray(shape, dtype, memory, start)
            for name, shape, dtype, start in self._layout.places
        }


def read_only(array: np.ndarray) -> np.ndarray:
    """Return a view that cannot be written, or the array itself if it is one."""
    if type(array) is np.ndarray and not array.flags.writeable:
        return array
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def numpy_dtype(dtype: str) -> np.dtype:
    """Return the type of arrays of an element type; numpy lacks bfloat16, so it is uint16."""
    return np.dtype(ELEMENT_TYPES[dtype].numpy)


def random_cache(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return random finite cache content: integers −8 … 8, or eighths of them in float types."""
    whole = rng.integers(-8, 9, shape)
    if dtype == "bfloat16":
        # The upper half of a float32, exact for so few bits.
        return ((whole / 8).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return (whole if dtype == "int8" else whole / 8).astype(dtype)
