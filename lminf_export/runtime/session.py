"""What every engine offers the language model: states, and one step of a few tokens."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lminf_export.runtime.cache import State


class Session(Protocol):
    """A loaded graph or engine. Letters: B batch, S new tokens, K logit rows, V vocabulary."""

    @property
    def attention(self) -> str:
        """What computes the attention, for people."""
        ...

    @property
    def caches_in_main_memory(self) -> bool:
        """Whether states take this machine's main memory."""
        ...

    def new_state(self, batch_size: int) -> State:
        """Return the state of B streams that have seen nothing."""
        ...

    def owns(self, state: State) -> bool:
        """Say whether a state was made by this session."""
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
            state: one of this session's.
            input_ids: (B, S) int64, S ≤ `step_limit`; any valid id behind a short row.
            new_length: (B,) int64, real tokens of each row, 0 … S.
            logits_index: (B, K) int64, rows of S whose logits are wanted; K may be 0.

        Returns:
            (B, K, V) float32, valid until the next step of the same state.

        Raises:
            SessionError: if the step fails.
        """
        ...
