"""The guard of every rewrite: the new graph against the original one, on random tokens.

Both compute in float32, and products of integers with activations as they are, so that what is
left is rounding of float32. The original runs with its own attention, mask and positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import ExportError, ModelError, SessionError, shortened
from lminf_export.export.wider_graph import widen
from lminf_export.rewriting.feeds import Call
from lminf_export.rewriting.job import RewriteJob
from lminf_export.rewriting.lighter import in_pieces
from lminf_export.rewriting.parts import (
    NARROW,
    NO_PACKED_WEIGHTS,
    weight_files,
    widened_array,
)
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession, weights_of_bytes
from lminf_export.tensors.torch_dtypes import torch_dtype

_SEED = 11
# Tokens, and for models whose weights take longer to read than the rest of the check.
_TOKENS, _FEW_TOKENS, _LARGE_BYTES = 48, 12, 2**31
# Largest error of a logit, relative to their range: rounding of float32 stays far below.
_LIMIT = 2e-4
# Tables in half precision are rounded: so many times the distance of two numbers near 1.
_STEPS = 8
# The same where the graph rounds activations to integers by itself: a near-tie goes either way.
_ROUNDED_LIMIT = 2e-2
_ROUNDING_OPERATORS = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QLinearMatMul")


@dataclass(frozen=True)
class Original:
    """The logits of the original graph.

    Attributes:
        tokens: (T,) int64.
        logits: (T, V), or (1, V) where it gives those of the last token only.
        notices: what the user should know about how it was run.
    """

    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]
    notices: tuple[str, ...]


def run_original(job: RewriteJob) -> Original:
    """Run the original graph, before anything is changed.

    Raises:
        ExportError: it does not run on this machine.
    """
    original = onnx.load(str(job.source.path), load_external_data=False)
    count = _count(job, rounds=_rounds(original))
    tokens = np.random.default_rng(_SEED).integers(0, job.found.vocab_size, count)
    try:
        return Original(tokens, _logits(job, original, tokens), ())
    except ModelError as error:
        notice = (
            f"the original graph does not run in onnxruntime on a CPU ({error}); the new one was "
            f"compared with it as it is with its fused attention in plain form"
        )
    try:
        plain = ir.to_proto(job.found.model)
        return Original(tokens, _logits(job, plain, tokens), (notice,))
    except ModelError as error:
        raise ExportError(
            f"the original graph does not run in onnxruntime on a CPU, so the new one cannot be "
            f"compared with it: {error} (--no-check leaves this comparison out)"
        ) from error


def _rounds(model: onnx.ModelProto) -> bool:
    """Say whether a graph rounds activations, by a scale of all tokens of a step."""
    return any(node.op_type in _ROUNDING_OPERATORS for node in model.graph.node)


def _count(job: RewriteJob, *, rounds: bool) -> int:
    """Return the tokens to compare: as many as both graphs treat alike."""
    plan = job.plan.attention
    narrowed = [
        layer.window_size
        for layer, own, finding in zip(plan.layers, plan.sliding, job.found.layers, strict=True)
        if own and finding.measured.window != layer.window_size
    ]
    most = _FEW_TOKENS if job.weight_bytes > _LARGE_BYTES else _TOKENS
    steps = [job.settings.chunk_size] if rounds else []
    return min(most, job.plan.exact_length, *narrowed, *steps)


def check_rewrite(job: RewriteJob, folder: Path, original: Original) -> list[str]:
    """Compare a rewritten graph with the one that it was made of.

    Args:
        job: the rewrite.
        folder: with the new graph and its weights.
        original: what the old one computes.

    Returns:
        Notices: what the graph does not do that others do.

    Raises:
        ExportError: they differ by more than rounding.
    """
    proto = onnx.load(str(folder / job.target.graph_name), load_external_data=False)
    rounds = _rounds(proto)
    eps = torch.finfo(torch_dtype(job.found.dtype)).eps
    limit = max(_ROUNDED_LIMIT if rounds else _LIMIT, _STEPS * eps)
    wide = replace(job, found=replace(job.found, dtype="float32"))
    bundle = Bundle(folder, wide.manifest())
    session = OnnxRuntimeSession(bundle, graph=_in_float32(proto), lean=True)
    model = LanguageModel(bundle, session)
    logits = model.forward(original.tokens[None], model.new_state())
    assert logits is not None
    error = _error(logits[0, -len(original.logits) :], original.logits)
    if not error <= limit:
        raise ExportError(
            f"the rewritten graph is not the original: over {len(original.tokens)} tokens its "
            f"logits are {error:.2g} of their range away, at most {limit:.2g} is rounding; "
            f"nothing was written (--no-check leaves this comparison out)"
        )
    if rounds:
        return [
            "the graph rounds activations by one scale for all tokens of a step: what it writes "
            "depends a little on how a text is cut into steps and on what shares its batch"
        ]
    return _check_batch(model, original.tokens, logits[0], limit)


def _error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest difference, relative to the range."""
    return float(np.abs(found - wanted).max() / np.ptp(wanted))


def _check_batch(
    model: LanguageModel, tokens: NDArray[np.int64], alone: NDArray[Any], limit: float
) -> list[str]:
    """Compare sequences of two lengths, side by side, with each alone."""
    count = min(len(tokens), _FEW_TOKENS)
    half = (count + 1) // 2
    rows = np.stack([tokens[:count]] * 2)
    try:
        logits = model.forward(rows, model.new_state(2), lengths=np.array([count, half]))
    except SessionError:
        return ["the graph takes one sequence at a time: its own sizes fix the batch"]
    assert logits is not None
    error = max(_error(logits[0], alone[:count]), _error(logits[1, :half], alone[:half]))
    if not error <= limit:
        raise ExportError(
            f"the rewritten graph mixes sequences of a batch: side by side their logits are "
            f"{error:.2g} of their range from those of each alone; nothing was written "
            f"(--no-check leaves this comparison out)"
        )
    return []


def _logits(
    job: RewriteJob, proto: onnx.ModelProto, tokens: NDArray[np.int64]
) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    names = weight_files(job.found.model)
    weights = weights_of_bytes(job.source.folder, names, options)
    options.add_session_config_entry(NO_PACKED_WEIGHTS, "1")
    options.enable_cpu_mem_arena = False
    in_pieces(proto.graph)
    found = job.found
    capacity = found.least_capacity and max(found.least_capacity, len(tokens))
    call = Call(len(tokens), 0, found.head_dims, capacity=capacity)
    feeds = found.inputs.feeds(call)
    feeds[found.inputs.ids] = tokens[None].astype(feeds[found.inputs.ids].dtype)
    named = {str(value.name): widened_array(array) for value, array in feeds.items()}
    try:
        session = ort.InferenceSession(
            _in_float32(proto), options, providers=["CPUExecutionProvider"]
        )
        run: Any = session.run(["logits"], named)
        del session, weights
    except Exception as error:  # onnxruntime's errors have no common base
        raise ModelError(shortened(" ".join(str(error).split()), 160)) from error
    logits: NDArray[np.float32] = run[0][0].astype(np.float32)
    return logits


def _in_float32(model: onnx.ModelProto) -> bytes:
    """Return a graph in which nothing is rounded to less than float32 on the way."""
    widen(model, NARROW)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return bytes(model.SerializeToString())
