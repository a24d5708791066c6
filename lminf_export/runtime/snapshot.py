"""A copy of what a state has read, which outlives the state and the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lminf_export.errors import InputError, SessionError, shown
from lminf_export.operator.bindings import BATCH, PAST_LENGTH
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import MAX_POSITION
from lminf_export.runtime.inputs import integers
from lminf_export.tensors.dtypes import ELEMENT_TYPES


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Lengths and caches of B streams at one moment, in main memory.

    It belongs to no session: any session of the same bundle restores it.

    Attributes:
        contract: of the graph that wrote the caches.
        past_length: (B,) int64, tokens each stream has read.
        caches: cache arrays by the name of the graph's input. Rings have the slots that tokens
            have used, min(C, furthest). numpy lacks bfloat16: its bits are held as uint16.
        state_id: `Manifest.state_id` of the bundle; None where it is not known, and then only
            the contract is compared.
    """

    contract: GraphContract
    past_length: np.ndarray
    caches: Mapping[str, np.ndarray]
    state_id: str | None = None

    def __post_init__(self) -> None:
        arrays = (self.past_length, *self.caches.values())
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise InputError("a Snapshot is made of numpy arrays: lengths, and caches by name")
        object.__setattr__(self, "past_length", _read_only(self.past_length))
        caches = {name: _read_only(array) for name, array in self.caches.items()}
        object.__setattr__(self, "caches", caches)

    @property
    def batch_size(self) -> int:
        """B, streams side by side."""
        return len(self.past_length)

    @property
    def furthest(self) -> int:
        """Tokens the longest stream has read."""
        return int(self.past_length.max(initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of the caches; at most `State.nbytes` of the state at that moment."""
        return sum(array.nbytes for array in self.caches.values())

    def rows(self, rows: Sequence[int] | np.ndarray) -> Snapshot:
        """Return a snapshot of some of the streams, in this order; a stream may be repeated.

        Raises:
            InputError: there is no such stream.
        """
        index = integers(rows, "rows")
        if index.ndim != 1 or index.size == 0:
            raise InputError("rows takes the numbers of streams, one at least")
        if index.min() < 0 or index.max() >= self.batch_size:
            raise InputError(
                f"rows={shown(index.tolist())}: this snapshot has streams 0 … {self.batch_size - 1}"
            )
        index = index.astype(np.int64)
        lengths = self.past_length[index]
        used = used_slots(self.contract, int(lengths.max()))
        caches = {name: array[index, :, : used[name]] for name, array in self.caches.items()}
        return Snapshot(self.contract, lengths, caches, self.state_id)

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
        if lengths is None:
            raise SessionError("this snapshot is damaged: it has no lengths of its streams")
        found = cls(contract, lengths, caches)
        found.require_sound()
        return found

    def require_fit(
        self, contract: GraphContract, batch_size: int, state_id: str | None = None
    ) -> None:
        """Refuse a snapshot that a state of this kind cannot take.

        Args:
            contract: of the state's graph.
            batch_size: B of the state.
            state_id: of the state's bundle; None where it is not known.

        Raises:
            SessionError: another bundle, another number of streams, or see `require_sound`.
        """
        if self.contract != contract:
            raise SessionError(
                "this snapshot is of another bundle: its layers, element types or vocabulary "
                "differ; restore it in a state of the bundle it was taken from"
            )
        if state_id is not None and self.state_id is not None and self.state_id != state_id:
            raise SessionError(
                "this snapshot is of another bundle: it has other weights or settings (state id "
                f"{self.state_id[:12]}…, this bundle has {state_id[:12]}…); restore it in a state "
                "of the bundle it was taken from"
            )
        self.require_sound()
        if self.batch_size != batch_size:
            raise SessionError(
                f"this snapshot has {self.batch_size} streams, the state has {batch_size}; make "
                "a state of as many, or choose some with Snapshot.rows"
            )

    def require_sound(self) -> None:
        """Refuse arrays that are no lengths and caches of the contract.

        Raises:
            SessionError: the first array that is missing, too many, of another shape or type,
                or too short for the tokens that the streams have read.
        """
        lengths = self.past_length
        if lengths.ndim != 1 or lengths.dtype != np.int64 or not lengths.size:
            raise SessionError(
                "this snapshot is damaged: it has no lengths of its streams, (B,) int64"
            )
        if lengths.min() < 0 or self.furthest > MAX_POSITION:
            raise SessionError("this snapshot is damaged: its streams have impossible lengths")
        expected = {spec.name: spec for spec in self.contract.caches(present=False)}
        if self.caches.keys() != expected.keys():
            raise SessionError("this snapshot is of another bundle: it has other caches")
        full = self.contract.ring_sizes()
        slots: dict[str, int] = {}
        for name, spec in expected.items():
            array, tokens = self.caches[name], spec.shape[2]
            if isinstance(tokens, str) and array.ndim == 4:
                slots.setdefault(tokens, min(array.shape[2], full[tokens]))
            wanted = spec.sized({**full, **slots, BATCH: self.batch_size})
            if array.shape != wanted or array.dtype != numpy_dtype(spec.dtype):
                raise SessionError(
                    f"this snapshot is of another bundle: {name} is {array.dtype}{array.shape}, "
                    f"expected {spec.dtype}{wanted}"
                )
        if any(count < min(self.furthest, full[symbol]) for symbol, count in slots.items()):
            raise SessionError(f"this snapshot is damaged: it lacks some of {self.furthest} tokens")


def used_slots(contract: GraphContract, furthest: int) -> dict[str, int]:
    """Return the slots of each cache that hold something of tokens 0 … furthest − 1, by name.

    Those of sink tokens are few and count in whole.
    """
    rings = {symbol: min(full, furthest) for symbol, full in contract.ring_sizes().items()}
    return {
        spec.name: spec.sized({**rings, BATCH: 1})[2] for spec in contract.caches(present=False)
    }


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


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
