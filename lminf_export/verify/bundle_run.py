"""The logits of a bundle over a whole stream, piece by piece and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from lminf_export.runtime.cache import State
from lminf_export.runtime.language_model import LanguageModel


class BundleRun:
    """A bundle that reads a stream in pieces of repeating sizes, as far as it is asked to.

    Args:
        model: the bundle's model.
        tokens: (T,) the stream.
        sizes: of the pieces.
    """

    def __init__(
        self, model: LanguageModel, tokens: NDArray[np.int64], sizes: Sequence[int]
    ) -> None:
        self._model, self._tokens, self._sizes = model, tokens, cycle(sizes)
        self._state = model.new_state(1)
        self._start = 0
        self._rest = np.empty((0, model.vocab_size), np.float32)

    def rows(self, count: int) -> Iterator[NDArray[np.float32]]:
        """Yield the logits (n, V) of the next tokens, `count` rows in all."""
        while count:
            if not len(self._rest):
                self._rest = self._read()
            piece, self._rest = self._rest[:count], self._rest[count:]
            count -= len(piece)
            yield piece

    def skip(self, seen: Callable[[State, int, int], None] = lambda *_: None) -> None:
        """Read the whole stream without its logits.

        Args:
            seen: called after every step with the state and the step's first and last token + 1.
        """
        while self._start < len(self._tokens):
            start, piece = self._start, self._next()
            while piece.shape[1]:
                count = min(piece.shape[1], self._model.session.step_limit(self._state))
                self._model.forward(piece[:, :count], self._state, logits="none")
                seen(self._state, start, start + count)
                start, piece = start + count, piece[:, count:]

    def _read(self) -> NDArray[np.float32]:
        logits = self._model.forward(self._next(), self._state)
        assert logits is not None
        return logits[0]

    def _next(self) -> NDArray[np.int64]:
        """Return the next piece of the stream (1, S)."""
        piece = self._tokens[None, self._start : self._start + next(self._sizes)]
        self._start += piece.shape[1]
        return piece
