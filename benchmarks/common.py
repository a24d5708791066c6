"""What every result carries, and how it is written."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lminf_export.runtime.environment import environment
from lminf_export.runtime.language_model import LanguageModel

__all__ = ["Stream", "environment", "write_result"]


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
        """Fill the caches as if so many tokens had been read."""
        self.state = self.model.new_state()
        self.state.fill(np.random.default_rng(0), position)

    def decode(self, count: int) -> float:
        """Return the seconds one token takes."""
        self._ready()
        start = time.perf_counter()
        for _ in range(count):
            self.model.forward(self.token, self.state, logits="last")
        return (time.perf_counter() - start) / count

    def prefill(self, count: int) -> float:
        """Read so many tokens into a fresh cache; return tokens per second."""
        tokens = np.random.default_rng(0).integers(0, self.model.vocab_size, (1, count))
        state = self.model.new_state()
        self._ready()
        start = time.perf_counter()
        self.model.forward(tokens, state, logits="last")
        return count / (time.perf_counter() - start)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Print a result as JSON on the last line, and write it if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))
    sys.stdout.flush()
