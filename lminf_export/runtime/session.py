"""The protocol of every engine: states, steps, and access to the content of a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from lminf_export.errors import InputError, shown
from lminf_export.runtime.cache import State
from lminf_export.runtime.kernels import KernelLibrary
from lminf_export.runtime.snapshot import Snapshot

# Takes the watched values of a step, by name.
Receiver = Callable[[Mapping[str, np.ndarray]], None]


class Session(Protocol):
    """A loaded graph or engine. Letters: B batch, S new tokens, K logit rows, V vocabulary.

    A session inherits this class for `snapshot`, `restore`, `stand_at` and `fill`, which only
    need the state.
    """

    @property
    def attention(self) -> str:
        """Description of what computes the attention, for logs and reports."""
        ...

    @property
    def library(self) -> KernelLibrary | None:
        """The kernel library whose functions work beside the engine on this machine's CPU."""
        ...

    @property
    def caches_in_main_memory(self) -> bool:
        """Whether states are allocated in this machine's main memory."""
        ...

    def new_state(self, batch_size: int, *, full: bool = False) -> State:
        """Return the state of B streams that have seen nothing.

        Args:
            batch_size: B.
            full: bind every ring in full from the start, which `State.rows` needs.
        """
        ...

    def owns(self, state: State) -> bool:
        """Return whether a state was made by the session."""
        ...

    def step_limit(self, state: State) -> int:
        """Return the largest S ≥ 1 the next step of this state may bring."""
        ...

    def step(
        self,
        state: State,
        input_ids: np.ndarray,
        new_length: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        """Run S tokens of every stream; the caches move on, past_length does not yet.

        The caller validates and calls `State.advance` when it accepts the logits. A step that
        failed may be repeated: it has only written where no query looks before it succeeds.
        Weights that yield NaN are the exception: what they wrote stays, take a new state.

        Args:
            state: one of the session's.
            input_ids: (B, S) int64, S ≤ `step_limit`; any valid id behind a short row.
            new_length: (B,) int64, real tokens of each row, 0 … S.
            logits_index: (B, K) int64, rows of S whose logits are wanted; K may be 0.

        Returns:
            (B, K, V) float32, valid until the next step of the same state.

        Raises:
            SessionError: if the step fails.
        """
        ...

    @property
    def cuda_graph(self) -> str | None:
        """Whether onnxruntime plays single tokens from a CUDA graph, or why not; None elsewhere."""
        return None

    @property
    def cache_updates(self) -> str | None:
        """Whether a plan's caches were updated in place so far, in words; None elsewhere."""
        return None

    def snapshot(self, state: State) -> Snapshot:
        """See `State.snapshot`."""
        return _state(state).snapshot()

    def restore(self, state: State, snapshot: Snapshot) -> None:
        """See `State.restore`."""
        _state(state).restore(snapshot)

    def stand_at(self, state: State, position: int | np.ndarray) -> None:
        """Set the lengths of a state as if it had read that many tokens; caches keep their content.

        For measurements: a step then takes the time it takes at that position.

        Args:
            state: one of the session's.
            position: tokens of every stream, or (B,) of each.

        Raises:
            InputError: another shape or type, or outside 0 … 2**40.
        """
        _state(state).stand_at(position)

    def fill(self, state: State, rng: np.random.Generator) -> None:
        """Fill a state's caches, as they are bound now, with random finite numbers."""
        if not isinstance(rng, np.random.Generator):
            raise InputError(f"rng={shown(rng)}: must be a numpy.random.Generator")
        _state(state).fill(rng)

    def watch(self, names: Sequence[str], receive: Receiver) -> Session:
        """Return a session of the same bundle that also returns named values of the graph.

        Args:
            names: of values in the graph.
            receive: called after every step with copies of the values, by name.

        Raises:
            SessionError: a name is not in the graph, or the engine cannot return other values.
        """
        ...


def _state(value: object) -> State:
    if not isinstance(value, State):
        raise InputError(f"{shown(value)} is not a state; new_state() makes one")
    return value
