"""One LambdaAttention node in onnxruntime, with or without a kernel of ours, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto

from benchmarks.support.operator_case import History, shared_inputs
from benchmarks.support.operator_node import one_node_model
from lminf_export.operator import contract, reference
from lminf_export.operator.attention_body import BodyFeatures, function_body
from scripts.gpu.check import same_precision
from scripts.gpu.streams import SMALL

# float32: the error of the rotation's tables and of products summed in any order (TF32 is off).
TOLERANCE = 2e-5
# float16, in units of torch's fused attention. Our kernels round where that does; the body rounds
# logits to the type once more, and scaled queries, which doubles it at most.
KERNEL_RATIO, BODY_RATIO = 2.0, 4.0
_CHUNKS = ((1, 1), (7, 3), (2, 7), (1, 0), (1, 1))
_ELEMENTS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


@dataclass(frozen=True)
class NodeErrors:
    """Largest differences from float64 over all real outputs of a stream.

    Attributes:
        error: of the node.
        torch_error: of torch's fused attention in the same type.
    """

    error: float
    torch_error: float

    @property
    def ratio(self) -> float:
        """The node's error in units of torch's."""
        return self.error / self.torch_error


def largest_error(provider: str, library: Path | None) -> float:
    """Run a stream of uneven chunks in float32 and return the largest error: see `errors`."""
    return errors(provider, library, torch.float32).error


def errors(provider: str, library: Path | None, dtype: torch.dtype) -> NodeErrors:
    """Run a stream of uneven chunks and return the largest errors.

    Args:
        provider: onnxruntime's execution provider.
        library: a custom operator library that takes the node; None for the function body.
        dtype: float32 or float16.
    """
    case = SMALL.with_(num_heads=4)
    attributes: dict[str, Any] = case.attributes()
    model = one_node_model(case, function_body(BodyFeatures()), _ELEMENTS[dtype])
    options = ort.SessionOptions()
    options.log_severity_level = 3  # each write that is not in place would be a warning
    if library is not None:
        options.register_custom_ops_library(str(library))
    settings = {"use_tf32": "0"} if provider.startswith("CUDA") else {}
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=[(provider, settings)]
    )
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"onnxruntime did not start {provider}: {session.get_providers()}")
    bases, error, torch_error = [10**6, 0], 0.0, 0.0
    history = History(case, bases, 12, dtype)
    wanted, caches = history.oracle(), history.caches(case.capacity)
    past = torch.tensor(bases)
    for chunk in _CHUNKS:
        new, width = torch.tensor(chunk), max(chunk)
        inputs = [
            x.contiguous()
            for x in (
                *history.chunk(past, new, width),
                *caches,
                *shared_inputs(case, past, new, width, case.capacity),
            )
        ]
        present = reference.lambda_attention(*inputs, **attributes)
        in_torch = same_precision(case, inputs, present)
        feed = {name: x.numpy() for name, x in zip(contract.input_names(), inputs, strict=True)}
        output, *caches = (
            torch.from_numpy(np.asarray(x))
            for x in session.run(list(contract.output_names()), feed)
        )
        for row, base in enumerate(bases):
            count, start = int(new[row]), int(past[row]) - base
            if count:
                truth = wanted[row, :, start : start + count]
                error = max(error, _apart(output[row, :, :count], truth))
                torch_error = max(torch_error, _apart(in_torch[row, :, :count], truth))
        past = past + new
    return NodeErrors(error, torch_error)


def _apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).abs().max())
