"""Summarises onnxruntime's profile of a decoding step by kind of operator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from lminf_export.bench.report import OperatorTime
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.options import Provider
from lminf_export.runtime.profiling import record_profile
from lminf_export.runtime.session import Session

_WARM_UP = 3


def profile_decoding(
    bundle: Bundle,
    position: int,
    steps: int,
    provider: Provider,
    threads: int | None,
    kernels: str,
) -> tuple[OperatorTime, ...]:
    """Decode a few tokens under onnxruntime's profiler; kinds of operators, slowest first.

    Profiling costs time itself, so the sum is more than a step takes without it.
    """
    token, one, index = np.zeros((1, 1), np.int64), np.ones(1, np.int64), np.zeros((1, 1), np.int64)

    def decode(session: Session) -> None:
        state = session.new_state(1)
        session.stand_at(state, position)
        for _ in range(_WARM_UP + steps):
            session.step(state, token, one, index)

    events = record_profile(bundle, decode, provider=provider, threads=threads, kernels=kernels)
    return summarize(events, steps)


def summarize(events: list[dict[str, Any]], steps: int) -> tuple[OperatorTime, ...]:
    """Sum the kernel times of the last steps of a profile by kind of operator."""
    runs = sorted(
        (event for event in events if event.get("name") == "model_run"),
        key=lambda event: event["ts"],
    )
    begin = runs[-steps]["ts"]
    micros: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        inside = event.get("cat") == "Node" and event["ts"] >= begin
        if not inside or not str(event["name"]).endswith("_kernel_time"):
            continue
        kind = str(event["args"]["op_name"])
        micros[kind] += event["dur"]
        calls[kind] += 1
    total = sum(micros.values()) or 1
    return tuple(
        OperatorTime(kind, time / steps / 1000, time / total, calls[kind] / steps)
        for kind, time in micros.most_common()
    )
