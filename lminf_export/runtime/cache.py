"""The state of a batch of streams between steps: their lengths, and caches of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType

import numpy as np

from lminf_export.errors import InputError, SessionError, shown
from lminf_export.operator.bindings import BATCH
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import MAX_POSITION, as_integer
from lminf_export.runtime.in_use import InUse
from lminf_export.runtime.inputs import checked_positions, listed_ids
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.snapshot_memory import random_cache
from lminf_export.runtime.unpicklable import Unpicklable

# A ring is bound only as large as its tokens need: attention reads all of it at every step.
GROWTH = 1.25
GRANULE = 64
_MOST_FORKS = 2**16


@dataclass
class Bound:
    """Lengths and slots of a state; where rings grow, it is built anew and replaced in one step.

    Attributes:
        capacities: full capacity C → slots bound of the rings of that capacity, at most C.
        past_length: (B,) int64, tokens each stream has read; bound to the graph as it is, so
            only ever changed in place.
    """

    capacities: Mapping[int, int]
    past_length: np.ndarray


class State(Unpicklable):
    """Lengths and caches of a batch of independent streams; made by `LanguageModel.new_state`.

    A session keeps its caches in a subclass. One thread at a time may use a state: another one
    is refused with an InputError, and so it is for all views of one state together. A copy
    (`copy.copy`, `copy.deepcopy`) is a fork.

    Args:
        contract: the graph's, with its caches.
        bound: lengths and slots at the start.
        state_id: of the bundle, `Manifest.state_id`.
        is_full: whether every ring is bound in full, and stays so.
        parent: the state of which this is a view.

    Attributes:
        run_seconds: time spent inside the engine's runs since the state was made.
        in_use: the context of every use.
    """

    in_its_place = "pickle its snapshot(), or save() it to a file"

    def __init__(
        self,
        contract: GraphContract,
        bound: Bound,
        *,
        state_id: str,
        is_full: bool = False,
        parent: State | None = None,
    ) -> None:
        self.contract = contract
        self.batch_size = len(bound.past_length)
        self.state_id = state_id
        self.is_full = is_full
        self.run_seconds = 0.0
        self._bound = bound
        self._parent = parent  # whose memory it is
        self.in_use: InUse = InUse() if parent is None else parent.in_use

    @property
    def capacities(self) -> dict[int, int]:
        """Full capacity C → slots bound of the rings of that capacity, at most C."""
        return dict(self._bound.capacities)

    @property
    def past_length(self) -> np.ndarray:
        """(B,) int64, a copy: tokens each stream has seen."""
        return self._bound.past_length.copy()

    @property
    def furthest(self) -> int:
        """Tokens the longest stream has seen."""
        longest: int = max(self._bound.past_length.tolist())
        return longest

    @property
    def nbytes(self) -> int:
        """Bytes of the caches bound now."""
        return self.contract.cache_bytes(self._bound.capacities) * self.batch_size

    @property
    def max_nbytes(self) -> int:
        """Bytes of the caches when every ring is full; they never take more."""
        return self.contract.cache_bytes() * self.batch_size

    @property
    def can_step(self) -> bool:
        """Whether a session can step over the state; false for some views in a GPU's memory."""
        return True

    def advance(self, new_length: np.ndarray) -> None:
        """Count the real tokens of a step that has succeeded.

        Args:
            new_length: (B,) int64, 0 … 2**40.

        Raises:
            InputError: another class, shape or type, or outside that range.
        """
        if (
            type(new_length) is not np.ndarray
            or new_length.dtype != np.int64
            or new_length.shape != (self.batch_size,)
            or min(counts := new_length.tolist()) < 0
            or max(counts) > MAX_POSITION
        ):
            raise InputError(
                f"new_length={shown(new_length)}: must be ({self.batch_size},) int64, tokens that "
                "each stream has read in the step"
            )
        self._bound.past_length += new_length

    def __copy__(self) -> State:
        """Return a state of its own, see `fork`."""
        return self.fork(1)[0]

    def __deepcopy__(self, memo: object) -> State:
        """Return a state of its own, see `fork`."""
        return self.fork(1)[0]

    def rows(self, start: int, stop: int) -> State:
        """Return a view of the streams start … stop − 1: it shares lengths and caches.

        A step over a view reads and writes its streams only, and takes the time of a batch of
        that many. Keep a view that is used again: what is bound for its steps is kept in it.

        Args:
            start: the first stream, from 0.
            stop: behind the last one, at most B.

        Raises:
            InputError: there are no such streams.
            SessionError: rings of this state may still grow (`new_state(…, full=True)` binds
                them in full), or the engine does not take memory that begins at this stream.
        """
        start = as_integer("start", start, 0, InputError)
        stop = as_integer("stop", stop, 0, InputError)
        if not start < stop <= self.batch_size:
            raise InputError(
                f"rows({start}, {stop}): this state has streams 0 … {self.batch_size - 1}; "
                "start must be below stop, and stop at most their number"
            )
        if not self.is_full:
            raise SessionError(
                "the rings of this state may still grow, so it has no views; make it with "
                "new_state(batch_size, full=True)"
            )
        return self._view(start, stop)

    def copy_row(self, source: int, target: int) -> None:
        """Copy one stream, its length and its caches, over another one.

        Args:
            source: the stream to copy, 0 … B − 1.
            target: the one that is lost.

        Raises:
            InputError: there is no such stream.
        """
        for name, row in (("source", source), ("target", target)):
            if as_integer(name, row, 0, InputError) >= self.batch_size:
                raise InputError(f"{name}={row}: this state has streams 0 … {self.batch_size - 1}")
        with self.in_use:
            if source != target:
                self._copy_row(int(source), int(target))

    def reset(self) -> None:
        """Set every stream to one that has read nothing; the caches become zeros."""
        with self.in_use:
            self._reset()

    def snapshot(self, *, into: Snapshot | None = None) -> Snapshot:
        """Return a copy of the lengths, and of the caches as far as tokens have used them.

        It takes at most `nbytes` of main memory, less while the rings are not full.

        Args:
            into: an earlier snapshot that is needed no more: its memory is used again, where
                it is large enough, and it holds nothing afterwards. Fresh memory costs about
                as much as the copy itself.

        Raises:
            SessionError: the memory is short.
        """
        if not isinstance(into, (Snapshot, NoneType)):
            raise InputError(f"into takes a Snapshot, not a {type(into).__name__}")
        with self.in_use:
            found, caches = Snapshot.begin(self.contract, self.past_length, self.state_id, into)
            self._read_caches(caches)
            return found

    def restore(self, snapshot: Snapshot) -> None:
        """Set the state to a snapshot; the steps after it yield the logits they yielded then.

        An interrupt leaves the state as it was or as it becomes; in a GPU's memory it may leave
        streams that have read nothing.

        Args:
            snapshot: of as many streams, of any session of the same bundle.

        Raises:
            SessionError: a snapshot of another bundle, of another number of streams, or one
                whose arrays do not fit; the state is as it was.
        """
        if not isinstance(snapshot, Snapshot):
            raise InputError(f"restore takes a Snapshot, not a {type(snapshot).__name__}")
        snapshot.require_fit(self.contract, self.batch_size, self.state_id)
        with self.in_use:
            self._replace(snapshot)

    def fork(self, n: int) -> list[State]:
        """Return `n` states of their own that have read what this one has.

        Each has as many streams, and takes `nbytes` of the memory that this one lies in.

        Raises:
            InputError: n is below 1, or beyond all use.
            SessionError: the memory is short.
        """
        n = as_integer("n", n, 1, InputError, maximum=_MOST_FORKS)
        with self.in_use:
            return [self._fork() for _ in range(n)]

    def save(self, path: str | Path, *, unread: Sequence[int] = ()) -> None:
        """Write the state to a file, which `load` reads; see `Snapshot.save`.

        Args:
            path: of the file, replaced in one step.
            unread: token ids of the stream that the state has not read, to be kept with it.

        Raises:
            InputError: it cannot be written there.
        """
        ids = listed_ids(unread, "unread", self.contract.vocab_size)
        replace(self.snapshot(), unread=tuple(ids)).save(path)

    def load(self, path: str | Path) -> tuple[int, ...]:
        """Set the state to one that `save` wrote, of as many streams.

        Args:
            path: of the file.

        Returns:
            The token ids that were saved as not read yet.

        Raises:
            InputError: there is no such file.
            SessionError: it is of another bundle or batch, damaged or cut short; the state is
                as it was.
        """
        found = Snapshot.load(path, self.contract, self.state_id, self.batch_size)
        self.restore(found)
        return found.unread

    def stand_at(self, position: int | np.ndarray) -> None:
        """See `Session.stand_at`."""
        with self.in_use:
            lengths = checked_positions(position, self.batch_size)
            self._reserve(int(lengths.max()) + 1)
            self._bound.past_length[...] = lengths

    def fill(self, rng: np.random.Generator) -> None:
        """See `Session.fill`."""
        sizes = {**self.contract.ring_sizes(self.capacities), BATCH: self.batch_size}
        content = {
            spec.name: random_cache(rng, spec.sized(sizes), spec.dtype)
            for spec in self.contract.caches(present=False)
        }
        with self.in_use:
            self._write_caches(content)

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

    def _view(self, start: int, stop: int) -> State:
        """Return a state of these streams that shares their memory."""
        raise NotImplementedError

    def _copy_row(self, source: int, target: int) -> None:
        """See `copy_row`; the rows differ and are there."""
        raise NotImplementedError

    def _reset(self) -> None:
        """See `reset`."""
        raise NotImplementedError

    def _replace(self, snapshot: Snapshot) -> None:
        """Take over lengths and caches that fit; slots behind shorter rings become zeros."""
        raise NotImplementedError

    def _reserve(self, needed: int) -> None:
        """Bind enough slots for positions 0 … needed − 1; caches keep their tokens."""

    def _fork(self) -> State:
        """Return another state with the same content."""
        raise NotImplementedError

    def _read_caches(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy the first slots of the caches into arrays by name, in graph order."""
        raise NotImplementedError

    def _write_caches(self, caches: Mapping[str, np.ndarray]) -> None:
        """Replace the content of the caches by arrays of their shapes."""
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


def restored_capacity(bound: int, full: int, needed: int) -> int:
    """Return how many slots to bind for a snapshot of a stream that has read so many tokens.

    What is bound is kept where a stream of that length might have grown to it; rings that are
    larger would cost time at every step.
    """
    least = grown_capacity(0, full, needed)
    return bound if min(needed, full) <= bound <= int(least * GROWTH) + GRANULE else least
