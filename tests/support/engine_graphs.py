"""Requests to build an engine of a tiny bundle, and a graph for engines run in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from lminf_export.engine.common import EngineRequest
from lminf_export.operator import bindings

# Rings of 21 and 14 slots: no chunk crosses either end, and both wrap several times.
CHUNKS = [7, 3, 4, 7, 1, 6, *[1] * 7, 7, 2, 5, 7, 7, 7]


def request_of(tiny, folder, **changes):
    settings = {
        "onnx_path": folder / "model.onnx",
        "plan_path": folder / "engine.plan",
        "contract": tiny.contract,
        "chunk_size": tiny.chunk_size,
    }
    return EngineRequest(**(settings | changes))


def run(path, tiny, batch_size=2):
    """Logits of a stream in CHUNKS, caches full-sized and apart."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    sizes = {**tiny.contract.ring_sizes(), bindings.BATCH: batch_size}
    specs = list(tiny.contract.caches(present=False))
    caches = {spec.name: np.zeros(spec.sized(sizes), spec.dtype) for spec in specs}
    ids = np.random.default_rng(3).integers(0, tiny.vocab_size, (batch_size, sum(CHUNKS)))
    parts, past = [], 0
    for size in CHUNKS:
        feed = {
            bindings.INPUT_IDS: ids[:, past : past + size],
            bindings.PAST_LENGTH: np.full(batch_size, past),
            bindings.NEW_LENGTH: np.full(batch_size, size),
            bindings.LOGITS_INDEX: np.tile(np.arange(size), (batch_size, 1)),
        }
        logits, *present = session.run(None, feed | caches)
        caches = dict(zip(caches, present, strict=True))
        parts.append(logits)
        past += size
    return np.concatenate(parts, axis=1)
