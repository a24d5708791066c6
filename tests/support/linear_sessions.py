"""Sessions on models of one linear operator, and what a step of a bundle runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from lminf_export import Bundle
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession

TYPES = {np.float32: onnx.TensorProto.FLOAT, np.float16: onnx.TensorProto.FLOAT16}


def session(model: bytes, library: str | None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def numbers(seed: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def steps_events(bundle: Bundle, kernels: str, folder: Path) -> list[dict]:
    """The operators of one step at a position where every ring is full."""
    session = OnnxRuntimeSession(bundle, threads=1, kernels=kernels, profile=folder / "p")
    state = session.new_state(1)
    state.stand_at(1000)
    one, zero = np.ones(1, np.int64), np.zeros((1, 1), np.int64)
    session.step(state, zero, one, zero)
    events = json.loads(session.end_profiling().read_text())
    return [e["args"] for e in events if str(e.get("name", "")).endswith("_kernel_time")]
