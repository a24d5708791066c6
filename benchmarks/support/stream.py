"""A bundle that decodes and reads random tokens, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lminf_export.runtime.language_model import LanguageModel


class Stream:
    """A bundle that decodes and reads random tokens, timed.

    Args:
        model: the bundle, loaded.
        ready: called before the clock starts.
    """

    def __init__(self, model: LanguageModel, ready: Callable[[], Any] = lambda: None) -> None:
        self.model, self._ready = model, ready
        self.token = np.array([[1]])

    def stand_at(self, position: int) -> None:
        """Fill the caches as if `position` tokens had been read."""
        self.state = self.model.new_state()
        self.model.session.stand_at(self.state, position)
        self.model.session.fill(self.state, np.random.default_rng(0))

    def decode(self, count: int) -> float:
        """Return the seconds one token takes."""
        self._ready()
        start = time.perf_counter()
        for _ in range(count):
            self.model.forward(self.token, self.state, logits="last")
        return (time.perf_counter() - start) / count

    def prefill(self, count: int) -> float:
        """Read `count` tokens into a fresh cache; return tokens per second."""
        tokens = np.random.default_rng(0).integers(0, self.model.vocab_size, (1, count))
        state = self.model.new_state()
        self._ready()
        start = time.perf_counter()
        self.model.forward(tokens, state, logits="last")
        return count / (time.perf_counter() - start)
