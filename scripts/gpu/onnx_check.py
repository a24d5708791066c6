"""One LambdaAttention node in onnxruntime, with or without a kernel of ours, against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto

from benchmarks.support.operator_case import History, shared_inputs
from benchmarks.support.operator_node import one_node_model
from lminf_export.operator import contract
from lminf_export.operator.attention_body import BodyFeatures, function_body
from scripts.gpu.streams import SMALL

# float32: the error of the rotation's tables and of products summed in any order (TF32 is off).
TOLERANCE = 2e-5


def largest_error(provider: str, library: Path | None) -> float:
    """Run a stream of uneven chunks in float32 and return the largest error.

    Args:
        provider: onnxruntime's execution provider.
        library: a custom operator library that takes the node; None for the function body.

    Returns:
        The largest difference from float64 over all real outputs.
    """
    case = SMALL.with_(num_heads=4)
    model = one_node_model(case, function_body(BodyFeatures()), TensorProto.FLOAT)
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    settings = {"use_tf32": 0} if provider.startswith("CUDA") else {}
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=[(provider, settings)]
    )
    bases, chunks, error = [10**6, 0], ((1, 1), (7, 3), (2, 7), (1, 0), (1, 1)), 0.0
    history = History(case, bases, 12, torch.float32)
    wanted, caches = history.oracle(), history.caches(case.capacity)
    past = torch.tensor(bases)
    for chunk in chunks:
        new, width = torch.tensor(chunk), max(chunk)
        state = [*history.chunk(past, new, width), *caches]
        inputs = [*state, *shared_inputs(case, past, new, width, case.capacity)]
        feed = {
            name: np.ascontiguousarray(x.numpy())
            for name, x in zip(contract.input_names(), inputs, strict=True)
        }
        output, *caches = (
            torch.from_numpy(x) for x in session.run(list(contract.output_names()), feed)
        )
        for row, base in enumerate(bases):
            count, start = int(new[row]), int(past[row]) - base
            if count:
                truth = wanted[row, :, start : start + count]
                error = max(error, float((output[row, :, :count].double() - truth).abs().max()))
        past = past + new
    return error
