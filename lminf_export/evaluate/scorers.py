"""Everything that can score a stream: the bundle itself, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lminf_export.evaluate.likelihood import negative_log_likelihood
from lminf_export.runtime.language_model import LanguageModel

Arrays = Mapping[str, np.ndarray]


class Scorer(Protocol):
    """Reads a stream chunk by chunk and says how likely it found each next token."""

    @property
    def chunk_size(self) -> int:
        """Tokens it likes to read at a time."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes its cache takes now."""
        ...

    def score(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read tokens (S,) and return the nats (S,) of the token behind each."""
        ...

    def snapshot(self) -> Arrays | None:
        """Return what is needed to go on later, or None if it cannot."""
        ...

    def restore(self, arrays: Arrays) -> None:
        """Go on from a snapshot."""
        ...


class BundleScorer:
    """The exported model: chunked prefill with the logits of every token."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._state = model.new_state()
        self.chunk_size = model.bundle.manifest.lambda_config.chunk_size

    @property
    def nbytes(self) -> int:
        """Bytes its cache takes now."""
        return self._state.nbytes

    def score(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read tokens (S,) and return the nats (S,) of the token behind each."""
        logits = self._model.forward(tokens[None], self._state)
        assert logits is not None
        return negative_log_likelihood(logits[0], targets)

    def snapshot(self) -> Arrays | None:
        """Return the caches, where they lie in main memory."""
        from lminf_export.runtime.onnxruntime import OnnxRuntimeState

        if isinstance(self._state, OnnxRuntimeState) and self._state.on_host:
            return self._state.snapshot()
        return None

    def restore(self, arrays: Arrays) -> None:
        """Go on from a snapshot."""
        from lminf_export.runtime.onnxruntime import OnnxRuntimeState

        state = self._model.new_state()
        assert isinstance(state, OnnxRuntimeState)
        state.restore(arrays)
        self._state = state
