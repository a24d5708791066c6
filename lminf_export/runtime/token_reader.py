"""Leads chunks of tokens through a session, in as many steps as they need."""

from __future__ import annotations

import math
from typing import Literal, NoReturn

import numpy as np

from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import InputError, SessionError
from lminf_export.runtime.cache import State
from lminf_export.runtime.session import Session

Logits = Literal["all", "last", "none"]


class TokenReader:
    """Runs checked tokens over states that are in use, and moves the states on.

    Args:
        manifest: of the bundle.
        session: of the states.
    """

    def __init__(self, manifest: Manifest, session: Session) -> None:
        self._session = session
        self._vocab_size, self._max_position = manifest.vocab_size, manifest.max_position
        self._dtype = manifest.dtype

    def read(
        self, ids: np.ndarray, counts: np.ndarray, state: State, logits: Logits
    ) -> np.ndarray | None:
        """Read a chunk of any size; see `LanguageModel.forward`.

        Args:
            ids: (B, S) int64.
            counts: (B,) int64, real tokens of each row.
            state: B streams.
            logits: which to return.
        """
        self._check_end(ids, counts, state)
        rows, width = ids.shape
        result = None
        if logits != "none":
            shape = (rows, width if logits == "all" else 1, self._vocab_size)
            ragged = bool((counts != width).any())
            result = (np.zeros if ragged else np.empty)(shape, np.float32)
        start, end = 0, int(counts.max())
        while start < end:
            stop = min(end, start + self._session.step_limit(state))
            self._piece(ids[:, start:stop], counts - start, state, result, start, logits)
            start = stop
        return result

    def one_token(self, ids: np.ndarray, state: State, *, wanted: bool = True) -> np.ndarray:
        """Run a token of every stream, as decoding does; return logits the next step overwrites."""
        furthest = state.furthest
        if furthest >= self._max_position:
            self._refuse_end(furthest + 1)
        rows = len(ids)
        new_length = np.ones(rows, np.int64)
        index = np.zeros((rows, int(wanted)), np.int64)
        found = self._session.step(state, ids, new_length, index)
        if not math.isfinite(found.sum()):
            self._refuse_infinite(found, state)
        state.advance(new_length)
        return found

    def _piece(
        self,
        ids: np.ndarray,
        remaining: np.ndarray,
        state: State,
        result: np.ndarray | None,
        start: int,
        logits: Logits,
    ) -> None:
        """Run one step and put its logits where they belong in the result."""
        rows, width = ids.shape
        new_length = remaining.clip(0, width)
        if logits == "all":
            index = np.broadcast_to(np.arange(width), (rows, width))
            real = index < new_length[:, None]
        else:
            # Rows whose last token is in this piece, if their logits are asked for.
            ends = (remaining > 0) & (remaining <= width) & (logits == "last")
            real = ends[:, None][:, : int(ends.any())]
            index = np.where(ends, remaining - 1, 0)[:, None][:, : real.shape[1]]
        found = self._session.step(state, ids, new_length, index)
        # A sum is finite only if its terms are: one pass, looked at closely only if it is not.
        if not math.isfinite(found.sum()):
            self._refuse_infinite(found[real], state)
        state.advance(new_length)
        if result is None or not real.size:
            return
        place = result[:, start : start + width] if logits == "all" else result
        if real.all():
            place[...] = found
        else:
            place[real] = found[real]

    def _check_end(self, ids: np.ndarray, counts: np.ndarray, state: State) -> None:
        if state.furthest + ids.shape[1] > self._max_position:
            furthest = int((state.past_length + counts).max())
            if furthest > self._max_position:
                self._refuse_end(furthest)

    def _refuse_end(self, furthest: int) -> NoReturn:
        raise InputError(
            f"the stream would reach token {furthest}; positions are exact up to "
            f"{self._max_position} only: start a new state"
        )

    def _refuse_infinite(self, logits: np.ndarray, state: State) -> None:
        """Raise SessionError if any of these logits is not finite."""
        if np.isfinite(logits).all():
            return
        raise SessionError(
            f"the step at token {state.furthest} yielded logits that are not finite; the weights "
            f"are damaged or overflow {self._dtype}: try --dtype float32, and check the model "
            "with lminf validate"
        )
