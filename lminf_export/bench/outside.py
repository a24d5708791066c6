"""Measures the time of a token outside the engine's run: checks, bindings, sampling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lminf_export.bench.report import OutsideRun
from lminf_export.runtime.language_model import LanguageModel

_WARM_UP = 3
_SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "seed": 0,
}


def outside_run(model: LanguageModel, position: int, count: int) -> OutsideRun:
    """Decode one stream in three ways, some tokens each, and take the engine's part away.

    Args:
        model: a bundle in onnxruntime or TensorRT.
        position: where to decode; set, not read.
        count: tokens of each way.
    """
    state = model.new_state()
    model.session.stand_at(state, position)
    model.session.fill(state, np.random.default_rng(1))
    token = np.zeros((1, 1), np.int64)

    def seconds(step: Callable[[], Any]) -> float:
        found = []
        for _ in range(_WARM_UP + count):
            inside, start = state.run_seconds, time.perf_counter()
            step()
            found.append(time.perf_counter() - start - (state.run_seconds - inside))
        return statistics.median(found[_WARM_UP:])

    def generating(**settings: Any) -> float:
        model.session.stand_at(state, position)
        # It must not end, so no token ends it.
        text = model.generate([0], max_new_tokens=None, stop_token_ids=(), state=state, **settings)
        next(text)
        return seconds(lambda: next(text))

    return OutsideRun(
        forward=seconds(lambda: model.forward(token, state, logits="last")),
        greedy=generating(),
        sampled=generating(**_SAMPLING),
    )
