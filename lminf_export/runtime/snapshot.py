"""A copy of what a state has read, which outlives the state and the session."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lminf_export.disk import parse_json
from lminf_export.errors import InputError, SessionError, require_instance, shown
from lminf_export.operator.bindings import BATCH, PAST_LENGTH
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import MAX_POSITION
from lminf_export.runtime.inputs import integers, listed_ids
from lminf_export.runtime.snapshot_memory import (
    OwnCaches,
    SnapshotMemory,
    numpy_dtype,
    read_only,
    used_slots,
)
from lminf_export.runtime.state_file import StateFile, state_pieces, write_state_file

_FORMAT, _VERSION = "lminf-state", "1"


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
        unread: token ids of each stream that it has not read; they come first in what it reads
            next. Saved with the rest.
        context: the latest token ids before those, as far as they are known: whoever decodes
            the text that follows needs some. Saved with the rest.
        labels: texts by name, of whoever saves it, such as a conversation. Saved with the rest.
    """

    contract: GraphContract
    past_length: np.ndarray
    caches: Mapping[str, np.ndarray] = field(repr=False)
    state_id: str | None = None
    unread: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    # Whether the arrays, which stay as they are, have been checked; and whose memory they are.
    _is_sound: bool = field(default=False, init=False, repr=False)
    _memory: SnapshotMemory | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.contract, GraphContract) or not isinstance(self.caches, Mapping):
            raise InputError("a Snapshot is made of a GraphContract, lengths, and caches by name")
        if not isinstance(self.state_id, str | None):
            raise InputError(f"state_id={shown(self.state_id)}: must be text, or None")
        arrays = (self.past_length, *self.caches.values())
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise InputError("a Snapshot is made of numpy arrays: lengths, and caches by name")
        if isinstance(self.caches, OwnCaches):
            self.caches.memory.is_shared = True
        object.__setattr__(self, "past_length", read_only(self.past_length.copy()))
        caches = {name: read_only(array) for name, array in self.caches.items()}
        object.__setattr__(self, "caches", caches)
        for name in ("unread", "context"):
            if getattr(self, name) != ():
                ids = listed_ids(getattr(self, name), name, self.contract.vocab_size)
                object.__setattr__(self, name, tuple(ids))
        if not isinstance(self.labels, Mapping) or not all(
            isinstance(text, str) for pair in self.labels.items() for text in pair
        ):
            raise InputError(f"labels={shown(self.labels)}: must be a table of texts")
        object.__setattr__(self, "labels", dict(self.labels))

    @classmethod
    def begin(
        cls,
        contract: GraphContract,
        past_length: np.ndarray,
        state_id: str | None,
        into: Snapshot | None,
    ) -> tuple[Snapshot, dict[str, np.ndarray]]:
        """Return a snapshot whose caches are still to be written, and these, to write them once.

        Args:
            contract: of the graph.
            past_length: (B,) int64.
            state_id: of the bundle.
            into: a snapshot whose memory may be used, and which holds nothing from then on.

        Raises:
            SessionError: the memory is short.
        """
        old = None if into is None else into._give_memory()
        furthest = max(past_length.tolist())
        memory = SnapshotMemory(contract, len(past_length), furthest, old)
        found = object.__new__(cls)  # all of it fits: there is nothing to check
        found.__dict__.update(
            contract=contract,
            past_length=read_only(past_length),
            caches=OwnCaches(memory),
            state_id=state_id,
            unread=(),
            context=(),
            labels={},
            _is_sound=True,
            _memory=memory,
        )
        return found, memory.arrays

    def _give_memory(self) -> SnapshotMemory | None:
        memory = self._memory
        if memory is not None:
            object.__setattr__(self, "_memory", None)
            object.__setattr__(self, "_is_sound", False)
            object.__setattr__(self, "caches", {})
        return None if memory is None or memory.is_shared else memory

    def __copy__(self) -> Snapshot:
        """Return another snapshot of the same arrays, which stay as they are."""
        return replace(self)

    def __reduce__(self) -> tuple[type[Snapshot], tuple[Any, ...]]:
        """Return what makes the snapshot anew, for pickle and deepcopy."""
        caches = dict(self.caches)
        parts = (self.contract, self.past_length, caches, self.state_id)
        return Snapshot, (*parts, self.unread, self.context, self.labels)

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
        return replace(self, past_length=lengths, caches=caches)

    def save(self, path: str | Path) -> None:
        """Write the snapshot to a file: safetensors, with a checksum; docs/state.md has the form.

        The file is replaced in one step, and only its owner can read it.

        Args:
            path: of the file.

        Raises:
            InputError: it cannot be written there.
            SessionError: a snapshot made by hand that does not know its bundle, or is not sound.
        """
        write_state_file(path, self.to_arrays(), self._metadata())

    def to_bytes(self) -> bytes:
        """Return what `save` writes, for a store that is no folder.

        Raises:
            InputError, SessionError: see `save`.
        """
        return b"".join(state_pieces(self.to_arrays(), self._metadata()))

    def _metadata(self) -> dict[str, str]:
        self.require_sound()
        if self.state_id is None:
            raise SessionError(
                "this snapshot does not know its bundle, so no file of it could be checked; save "
                "one that State.snapshot returned"
            )
        return {
            "format": _FORMAT,
            "format_version": _VERSION,
            "state_id": self.state_id,
            "contract": json.dumps(_contract_fields(self.contract)),
            "lengths": json.dumps(self.past_length.tolist()),
            "unread": json.dumps(self.unread),
            "context": json.dumps(self.context),
            "labels": json.dumps(self.labels),
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        contract: GraphContract,
        state_id: str,
        batch_size: int | None = None,
    ) -> Snapshot:
        """Read a snapshot that `save` wrote; see `LanguageModel.load_snapshot`.

        Nothing is trusted: no more memory is taken than the file has bytes.

        Args:
            path: of the file.
            contract: of the bundle's graph.
            state_id: of the bundle.
            batch_size: streams it must have; None for any number.

        Raises:
            InputError: there is no such file.
            SessionError: it is of another bundle or batch, damaged or cut short.
        """
        with StateFile.open(path) as file:
            return cls._read(file, contract, state_id, batch_size)

    @classmethod
    def from_bytes(cls, data: bytes, contract: GraphContract, state_id: str) -> Snapshot:
        """Return the snapshot of which `to_bytes` made these; see `load`.

        Raises:
            InputError: they are no bytes.
            SessionError: see `load`.
        """
        return cls._read(StateFile.of_bytes(data), contract, state_id, None)

    @classmethod
    def _read(
        cls, file: StateFile, contract: GraphContract, state_id: str, batch_size: int | None
    ) -> Snapshot:
        require_instance("contract", contract, GraphContract)
        if not isinstance(state_id, str):
            raise InputError(f"state_id={shown(state_id)}: must be text, Manifest.state_id")
        known = file.metadata.get("format"), file.metadata.get("format_version")
        if known != (_FORMAT, _VERSION):
            raise file.damaged(
                f"its form is {known[0]!r} version {known[1]!r}, expected {_FORMAT!r} "
                f"version {_VERSION!r}"
            )
        if file.metadata.get("state_id") != state_id or not _is_json(
            file.metadata.get("contract"), _contract_fields(contract)
        ):
            raise SessionError(
                f"{file.name} is a state of another bundle (id {file.metadata.get('state_id')!r}, "
                f"this bundle has {state_id!r}): load it with the bundle that wrote it"
            )
        _, shape = file.shapes.get(PAST_LENGTH, (None, ()))
        if batch_size is not None and shape != (batch_size,):
            raise SessionError(
                f"{file.name} has streams {shape}, the state has {batch_size}; make a state of as "
                "many, or choose some with Snapshot.rows"
            )
        arrays = file.read()
        lengths = arrays.pop(PAST_LENGTH, np.zeros(0))
        if not _is_json(file.metadata.get("lengths"), lengths.tolist()):
            raise file.damaged("its lengths are not those that it says")
        try:
            unread, context = (
                tuple(parse_json(file.metadata.get(name, ""))) for name in ("unread", "context")
            )
            labels = parse_json(file.metadata.get("labels", "{}"))
            found = cls(contract, lengths, arrays, state_id, unread, context, labels)
            found.require_sound()
        except (ValueError, TypeError, SessionError) as error:
            raise file.damaged(str(error)) from None
        return found

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return lengths and caches by the names of the graph's inputs, to be saved."""
        return {PAST_LENGTH: self.past_length, **self.caches}

    @classmethod
    def from_arrays(cls, contract: GraphContract, arrays: Mapping[str, np.ndarray]) -> Snapshot:
        """Return the snapshot that `to_arrays` wrote.

        Raises:
            SessionError: the arrays are not the caches of this contract.
        """
        if not isinstance(arrays, Mapping):
            raise SessionError(f"{shown(arrays)} is no snapshot: expected arrays by name")
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
        if self._is_sound:
            return
        lengths = self.past_length
        if lengths.ndim != 1 or lengths.dtype != np.int64 or not lengths.size:
            raise SessionError(
                "this snapshot is damaged: it has no lengths of its streams, (B,) int64"
            )
        if lengths.min() < 0 or self.furthest > MAX_POSITION:
            raise SessionError("this snapshot is damaged: its streams have impossible lengths")
        expected = {spec.name: spec for spec in self.contract.caches(present=False)}
        if self.caches.keys() != expected.keys():
            raise SessionError(
                "this snapshot is of another bundle: it has other caches"
                if self.caches
                else "this snapshot has no caches; its memory may be a later snapshot's"
            )
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
        object.__setattr__(self, "_is_sound", True)


def _contract_fields(contract: GraphContract) -> dict[str, Any]:
    """Return what a file says of the contract."""
    return {
        "dtype": contract.dtype,
        "kv_cache_dtype": contract.kv_cache_dtype,
        "vocab_size": contract.vocab_size,
        "layers": [list(astuple(layer)) for layer in contract.layers],
    }


def _is_json(text: str | None, expected: Any) -> bool:
    """Whether a text is the JSON of a value."""
    try:
        return text is not None and bool(parse_json(text) == expected)
    except ValueError:
        return False
