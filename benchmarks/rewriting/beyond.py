"""Where onnxruntime-genai's graph of a short context ends, and how the rewritten one goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_PROMPT = [7, 8, 9, 10, 11]


def original_stops(folder: Path, context_length: int) -> dict[str, Any]:
    """Return how often a generator of the original gives a token, and what ends it."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))

    def generator(length: int) -> Any:
        params = onnxruntime_genai.GeneratorParams(model)
        # A shortest length keeps the end of text from being chosen.
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(model, params)

    whole = generator(context_length)
    whole.append_tokens(np.array(_PROMPT, np.int32))
    more = generator(context_length)
    return {
        "context_length": context_length,
        "at_max_length": _until_error(whole.generate_next_token, 4 * context_length),
        "tokens_by_then": whole.token_count(),
        "with_a_larger_max_length": _error_of(lambda: generator(4 * context_length)),
        "with_a_longer_prompt": _error_of(
            lambda: more.append_tokens(np.full(context_length + 1, 7, np.int32))
        ),
    }


def _until_error(call: Callable[[], Any], times: int) -> str:
    for _ in range(times):
        if line := _error_of(call):
            return line
    raise SystemExit(f"the original gave {times} tokens without an error")


def _error_of(call: Callable[[], Any]) -> str:
    """Return the error's text, empty without one."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def rewritten_goes_on(folder: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Let the rewritten graph write tokens one after the other; return their times."""
    import lminf_export

    model = lminf_export.load(folder, threads=threads)
    state = model.new_state()
    logits = model.forward([_PROMPT], state, logits="last")
    times, finite = [], True
    for _ in range(tokens):
        begun = time.perf_counter()
        assert logits is not None
        token = int(np.argmax(logits[0, -1]))
        logits = model.forward([[token]], state, logits="last")
        times.append(time.perf_counter() - begun)
        assert logits is not None
        finite = finite and bool(np.isfinite(logits).all())
    quarters = [times[i * tokens // 4 : (i + 1) * tokens // 4] for i in range(4)]
    by_quarter = [statistics.median(part) * 1e3 for part in quarters]
    return {
        "tokens": tokens,
        "position": state.furthest,
        "logits_finite": finite,
        "ms_per_token_by_quarter": [round(ms, 3) for ms in by_quarter],
        "last_quarter_over_second": round(by_quarter[3] / by_quarter[1], 4),
    }
