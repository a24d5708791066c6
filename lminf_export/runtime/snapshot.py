"""A copy of what a state has read, which outlives the state and the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lminf_export.errors import SessionError
from lminf_export.operator.bindings import BATCH, PAST_LENGTH
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import MAX_POSITION
from lminf_export.tensors.dtypes import ELEMENT_TYPES


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Lengths and caches of B streams at one moment, in main memory.

    It belongs to no session: any session of a graph with an equal contract restores it.

    Attributes:
        contract: of the graph that wrote the caches.
        past_length: (B,) int64, tokens each stream has read.
        caches: cache arrays by the name of the graph's input. Rings have the slots that were bound
            when the snapshot was taken. numpy lacks bfloat16: its bits are held as uint16.
    """

    contract: GraphContract
    past_length: np.ndarray
    caches: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for array in (self.past_length, *self.caches.values()):
            array.flags.writeable = False

    @property
    def batch_size(self) -> int:
        """B, streams side by side."""
        return len(self.past_length)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches; `State.nbytes` of the state at that moment."""
        return sum(array.nbytes for array in self.caches.values())

    @property
    def capacities(self) -> dict[int, int]:
        """Full capacity → slots of the rings of that capacity."""
        full = self.contract.ring_sizes()
        return {
            full[spec.shape[2]]: self.caches[spec.name].shape[2]
            for spec in self.contract.caches(present=False)
            if spec.shape[2] in full
        }

    def rows(self, rows: Sequence[int] | np.ndarray) -> Snapshot:
        """Return a snapshot of some of the streams, in this order; a stream may be repeated."""
        index = np.asarray(rows, np.int64)
        caches = {name: array[index] for name, array in self.caches.items()}
        return Snapshot(self.contract, self.past_length[index], caches)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return lengths and caches by the names of the graph's inputs, to be saved."""
        return {PAST_LENGTH: self.past_length, **self.caches}

    @classmethod
    def from_arrays(cls, contract: GraphContract, arrays: Mapping[str, np.ndarray]) -> Snapshot:
        """Return the snapshot that `to_arrays` wrote.

        Raises:
            SessionError: the arrays are not the caches of this contract.
        """
        caches = {name: array for name, array in arrays.items() if name != PAST_LENGTH}
        lengths = arrays.get(PAST_LENGTH)
        if lengths is None or lengths.ndim != 1 or lengths.dtype != np.int64:
            raise SessionError("this snapshot is damaged: it has no lengths of its streams")
        found = cls(contract, lengths, caches)
        found._check()
        return found

    def _check(self) -> None:
        expected = {spec.name: spec for spec in self.contract.caches(present=False)}
        if self.caches.keys() != expected.keys():
            raise SessionError("this snapshot is of another bundle: it has other caches")
        full = self.contract.ring_sizes()
        slots: dict[str, int] = {}
        for name, spec in expected.items():
            array, tokens = self.caches[name], spec.shape[2]
            if isinstance(tokens, str) and array.ndim == 4:
                slots.setdefault(tokens, min(array.shape[2], full[tokens]))
            sizes = {**full, **slots, BATCH: self.batch_size}
            if array.shape != spec.sized(sizes) or array.dtype != numpy_dtype(spec.dtype):
                raise SessionError(
                    f"this snapshot is of another bundle: {name} is {array.dtype}{array.shape}, "
                    f"expected {spec.dtype}{spec.sized(sizes)}"
                )
        furthest = int(self.past_length.max(initial=0))
        if self.past_length.min(initial=0) < 0 or furthest > MAX_POSITION:
            raise SessionError("this snapshot is damaged: its streams have impossible lengths")
        if any(count < min(furthest, full[symbol]) for symbol, count in slots.items()):
            raise SessionError(f"this snapshot is damaged: it lacks some of {furthest} tokens")


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
