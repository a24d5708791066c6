"""The guard of every rewrite: the new graph against the original one, on random tokens.

Both compute in float32, and products of integers with activations as they are, so that what is
left is rounding of float32. The original runs with its own attention, mask and positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import ExportError, SessionError
from lminf_export.export.short_rotation import rotate_as
from lminf_export.operator.bindings import present_name
from lminf_export.operator.contract import DOMAIN
from lminf_export.rewriting.assembling import OWN
from lminf_export.rewriting.job import RewriteJob
from lminf_export.rewriting.original import Original, in_float32, rounds
from lminf_export.rewriting.planning import RewritePlan
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from lminf_export.tensors.torch_dtypes import torch_dtype

# Tokens that are compared side by side.
_FEW_TOKENS = 12
# Largest error of a logit, relative to their range: rounding of float32 stays far below.
_LIMIT = 2e-4
# Tables in half precision are rounded: so many times the distance of two numbers near 1.
_STEPS = 8
# The same where the graph rounds activations to integers by itself: a near-tie goes either way.
_ROUNDED_LIMIT = 2e-2
_NOTHING = "nothing was written (--no-check leaves this comparison out)"


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
    if job.short_plan is not None:
        _rotate_as_short(proto, job.short_plan)
    rounding = rounds(proto)
    eps = torch.finfo(torch_dtype(job.found.dtype)).eps
    limit = max(_ROUNDED_LIMIT if rounding else _LIMIT, _STEPS * eps)
    wide = replace(job, found=replace(job.found, dtype="float32"))
    bundle = Bundle(folder, wide.manifest())
    session = OnnxRuntimeSession(bundle, graph=in_float32(proto), lean=True)
    model = LanguageModel(bundle, session)
    count = len(original.tokens)
    whole = _read(model, original.tokens, [count])
    error = _error(whole[-len(original.logits) :], original.logits)
    if not error <= limit:
        raise ExportError(
            f"the rewritten graph is not the original: over {count} tokens its logits are "
            f"{error:.2g} of their range away, at most {limit:.2g} is rounding; {_NOTHING}"
        )
    if rounding:
        return [
            "the graph rounds activations by one scale for all tokens of a step: what it writes "
            "depends a little on how a text is cut into steps and on what shares its batch"
        ]
    _check_steps(model, original, whole, limit)
    return _check_batch(model, original.tokens, whole, limit)


def _rotate_as_short(model: onnx.ModelProto, plan: RewritePlan) -> None:
    """Give a graph the rotation that the original has for texts as short as those compared."""
    rotate_as(model, plan.attention, OWN)
    scales = {present_name(index, "key"): scale for index, scale in enumerate(plan.scales)}
    for node in model.graph.node:
        scale = scales.get(node.output[1]) if node.domain == DOMAIN and node.output[1:] else None
        for attribute in node.attribute:
            if attribute.name == "scale" and scale is not None:
                attribute.f = scale


def _read(
    model: LanguageModel, tokens: NDArray[np.int64], sizes: Sequence[int]
) -> NDArray[np.float32]:
    """Return logits (R, V) of tokens read in some steps, of the first of several its last row."""
    state = model.new_state()
    found = []
    for index, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        is_first = index == 0 and len(sizes) > 1
        logits = model.forward(part[None], state, logits="last" if is_first else "all")
        assert logits is not None
        found.append(logits[0])
    return np.concatenate(found)


def _check_steps(
    model: LanguageModel, original: Original, whole: NDArray[Any], limit: float
) -> None:
    """Compare both graphs with themselves: a text is cut into steps anywhere, and rows chosen."""
    tokens, stepped = original.tokens, original.in_steps
    if stepped is not None and not _error(stepped, original.logits[-1]) <= limit:
        raise ExportError(
            f"the original graph computes in two steps otherwise than in one (its logits are "
            f"{_error(stepped, original.logits[-1]):.2g} of their range apart), so no graph can "
            f"equal it in both; {_NOTHING}"
        )
    half = (len(tokens) + 1) // 2
    sizes = [size for size in (half, 1, len(tokens) - half - 1) if size > 0]
    rows = _read(model, tokens, sizes)
    found = {
        "whose logits are asked for": _error(rows[0], whole[half - 1]),
        "how a text is cut into steps": _error(rows[1:], whole[half:]) if rows[1:].size else 0.0,
    }
    for what, error in found.items():
        if not error <= limit:
            raise ExportError(
                f"the rewritten graph depends on {what}: its logits are {error:.2g} of their range "
                f"apart; something besides attention looks at other tokens; {_NOTHING}"
            )


def _error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return the largest difference, relative to the range."""
    extent = float(np.ptp(wanted))
    return float(np.abs(found - wanted).max()) / extent if extent > 0 else float("nan")


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
            f"{error:.2g} of their range from those of each alone; {_NOTHING}"
        )
    return []
