"""The original graph, run on random tokens before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from lminf_export.errors import ExportError, ModelError, shortened
from lminf_export.export.wider_graph import widen
from lminf_export.rewriting.feeds import Call
from lminf_export.rewriting.job import RewriteJob
from lminf_export.rewriting.lighter import in_pieces
from lminf_export.rewriting.parts import NARROW, NO_PACKED_WEIGHTS, weight_files, widened_array
from lminf_export.runtime.onnxruntime import weights_of_bytes

_SEED = 11
# Tokens, and for models whose weights take longer to read than the rest of the check.
_TOKENS, _FEW_TOKENS, _LARGE_BYTES = 48, 12, 2**31
_ROUNDING_OPERATORS = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QLinearMatMul")


@dataclass(frozen=True)
class Original:
    """The logits of the original graph.

    Attributes:
        tokens: (T,) int64.
        logits: (T, V), or (1, V) where it gives those of the last token only.
        in_steps: (V,) of the last token once more, after two steps; None where it takes no second
            one.
        notices: what the user should know about how it was run.
    """

    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]
    in_steps: NDArray[np.float32] | None
    notices: tuple[str, ...] = ()


def run_original(job: RewriteJob) -> Original:
    """Run the original graph, before anything is changed.

    Raises:
        ExportError: it does not run on this machine, or computes nothing.
    """
    original = onnx.load(str(job.source.path), load_external_data=False)
    count = _count(job, rounds=rounds(original))
    tokens = np.random.default_rng(_SEED).integers(0, job.found.vocab_size, count)
    try:
        return _sound(_run(job, original, tokens))
    except ModelError as error:
        notice = (
            f"the original graph does not run in onnxruntime on a CPU ({error}); the new one was "
            f"compared with it as it is with its fused attention in plain form"
        )
    try:
        plain = _sound(_run(job, ir.to_proto(job.found.model), tokens))
        return replace(plain, notices=(notice,))
    except ModelError as error:
        raise ExportError(
            f"the original graph does not run in onnxruntime on a CPU, so the new one cannot be "
            f"compared with it: {error} (--no-check leaves this comparison out)"
        ) from error


def _sound(original: Original) -> Original:
    """Check that logits are numbers that differ.

    Raises:
        ExportError: they do not.
    """
    logits = original.logits
    if not np.isfinite(logits).all() or np.ptp(logits) == 0:
        raise ExportError(
            "the original graph's logits are no numbers, or are all the same: its weights are "
            "damaged or were never written; copy the whole model again"
        )
    return original


def rounds(model: onnx.ModelProto) -> bool:
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


def _run(job: RewriteJob, proto: onnx.ModelProto, tokens: NDArray[np.int64]) -> Original:
    """Run a graph over all tokens, then in two steps."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    weights = weights_of_bytes(job.source.folder, weight_files(job.found.model), options)
    options.add_session_config_entry(NO_PACKED_WEIGHTS, "1")
    options.enable_cpu_mem_arena = False
    in_pieces(proto.graph)
    outputs = [output.name for output in proto.graph.output]
    try:
        session = ort.InferenceSession(
            in_float32(proto), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's errors have no common base
        raise ModelError(_reason(error)) from error
    (logits,) = _step(job, session, tokens, 0, {}, ["logits"])
    found = Original(tokens, logits[0].astype(np.float32), None)
    if rounds(proto):
        return found
    try:
        return replace(found, in_steps=_in_two_steps(job, session, tokens, outputs))
    except ModelError as error:
        notice = (
            f"the original graph does not go on from its own caches here ({error}); the new one "
            f"was compared with what it computes in one step"
        )
        return replace(found, notices=(notice,))
    finally:
        del session, weights


def _reason(error: Exception) -> str:
    return shortened(" ".join(str(error).split()), 160)


def _in_two_steps(
    job: RewriteJob, session: ort.InferenceSession, tokens: NDArray[np.int64], outputs: list[str]
) -> NDArray[np.float32] | None:
    """Return the last token's logits after two steps, None where no cache leads to the second."""
    caches = [str(v.name) for v, role in job.found.inputs.roles.items() if role == "cache"]
    presents = _presents(caches, outputs)
    half = (len(tokens) + 1) // 2
    if presents is None or half == len(tokens):
        return None
    names = list(presents)
    kept = _step(job, session, tokens, half, {}, [presents[name] for name in names], last=False)
    past = dict(zip(names, kept, strict=True))
    (logits,) = _step(job, session, tokens, half, past, ["logits"])
    return np.asarray(logits[0, -1], np.float32)


def _step(
    job: RewriteJob,
    session: ort.InferenceSession,
    tokens: NDArray[np.int64],
    split: int,
    past: Mapping[str, NDArray[Any]],
    outputs: list[str],
    *,
    last: bool = True,
) -> list[Any]:
    """Run the tokens behind a split, or (not `last`) those before it."""
    found = job.found
    start, end = (split, len(tokens)) if last else (0, split)
    capacity = found.least_capacity and max(found.least_capacity, len(tokens))
    if found.inputs.in_place and capacity is None:
        capacity = len(tokens)
    feeds = found.inputs.feeds(Call(end - start, start, found.head_dims, capacity=capacity))
    feeds[found.inputs.ids] = tokens[None, start:end].astype(feeds[found.inputs.ids].dtype)
    named = {str(value.name): widened_array(array) for value, array in feeds.items()}
    try:
        result: list[Any] = session.run(outputs, {**named, **past})
    except Exception as error:  # as above
        raise ModelError(_reason(error)) from error
    return result


def _presents(caches: Iterable[str], outputs: Iterable[str]) -> dict[str, str] | None:
    """Return the output that continues each cache, by names; None where they do not say it."""
    given: dict[tuple[str, ...], str] = {}
    for name in outputs:
        if name != "logits":
            given.setdefault(_meaning(name), name)
    found = {name: given.get(_meaning(name), "") for name in caches}
    known = set(found.values())
    return found if "" not in known and len(known) == len(found) else None


def _meaning(name: str) -> tuple[str, ...]:
    """Return a cache's numbers, and whether it holds keys or values."""
    plain = name.lower().replace("key_values", "").replace("keyvalues", "")
    kinds = re.findall(r"key|value|(?<![a-z])[kv](?![a-z])", plain)
    return (*re.findall(r"\d+", plain), *(kind[0] for kind in kinds[-1:]))


def in_float32(model: onnx.ModelProto) -> bytes:
    """Return a graph in which nothing is rounded to less than float32 on the way."""
    widen(model, NARROW)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return bytes(model.SerializeToString())
