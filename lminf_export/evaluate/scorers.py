"""The protocol of methods that score a stream, and the scorer of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.verify.likelihood import negative_log_likelihood

Arrays = Mapping[str, np.ndarray]


class Scorer(Protocol):
    """Reads a stream chunk by chunk and returns the likelihood of each next token."""

    @property
    def chunk_size(self) -> int:
        """Preferred number of tokens of one call."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes its cache takes now."""
        ...

    def score(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read tokens (S,) and return the nats (S,) of the token behind each."""
        ...

    def snapshot(self) -> Arrays | None:
        """Return what is needed to continue later, or None if that is not supported."""
        ...

    def restore(self, arrays: Arrays) -> None:
        """Continue from a snapshot."""
        ...


class BundleScorer:
    """The exported model: chunked prefill with the logits of every token."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._state = model.new_state()
        self.chunk_size = model.bundle.manifest.lambda_config.chunk_size

    @property
    def nbytes(self) -> int:
        """See `Scorer.nbytes`."""
        return self._state.nbytes

    def score(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Scorer.score`."""
        logits = self._model.forward(tokens[None], self._state)
        assert logits is not None
        return negative_log_likelihood(logits[0], targets)

    def snapshot(self) -> Arrays | None:
        """See `Scorer.snapshot`."""
        return self._model.session.snapshot(self._state).to_arrays()

    def restore(self, arrays: Arrays) -> None:
        """See `Scorer.restore`."""
        snapshot = Snapshot.from_arrays(self._state.contract, arrays)
        self._model.session.restore(self._state, snapshot)
