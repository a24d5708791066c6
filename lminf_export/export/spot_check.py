"""The guard of every export: the written graph against the unmodified model, on a few tokens.

Inside the window both must agree. The model is transformers' own, with its own attention and masks,
and its weights are read from the source by their names: neither the adapters of `models/` nor the
weights file take part in it. The graph is run as it stands in the folder that becomes the bundle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.stock import stock_model
from lminf_export.errors import ConfigError, ExportError
from lminf_export.export.job import ExportJob
from lminf_export.export.short_rotation import rotate_as
from lminf_export.export.wider_graph import widen
from lminf_export.models.base import AttentionPlan
from lminf_export.models.expert_facts import experts_per_token
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from lminf_export.tensors.torch_dtypes import torch_dtype

_SEED = 7
# Tokens, and for models whose weights take longer to read than the rest of the check.
_TOKENS, _FEW_TOKENS, _LARGE_BYTES = 12, 4, 2**31
# Largest error of a logit, relative to the range: at least the first, and this many times the
# distance of two numbers near 1 in the graph's type. A right graph stays far below, and one with a
# wrong weight, mask or rotation exceeds it.
_LIMIT, _STEPS = 1e-3, 8
# In half precision deep models may err more. Then torch in that precision is the measure.
_FACTOR, _MOST = 4.0, 0.3
# Of quantised weights and caches: error by standard deviation, both over all logits. Unrelated
# logits have 1.4.
_QUANTIZED_LIMIT = 1.0
_TABLES = "tables."  # what the graph's tables of rotations are called by


@dataclass(frozen=True)
class _Error:
    """How far logits are from others.

    Attributes:
        largest: largest difference by range; of a mixture of experts the median over tokens, since
            a token whose router met a near-tie rightly differs.
        relative: root mean square of the difference by the standard deviation.
    """

    largest: float
    relative: float

    @classmethod
    def of(cls, found: NDArray[Any], wanted: NDArray[Any], *, routed: bool) -> _Error:
        error = np.abs(found.astype(np.float64) - wanted)
        by_token = error.max(-1) / np.ptp(wanted)
        largest = np.median(by_token) if routed else by_token.max()
        return cls(float(largest), float((error**2).mean() ** 0.5 / wanted.std()))


def check_graph(job: ExportJob, folder: Path) -> None:
    """Compare a written graph with the model that it was made of.

    Args:
        job: the export.
        folder: with graph and weights.

    Raises:
        ExportError: they differ by more than rounding.
    """
    count = _FEW_TOKENS if job.weight_bytes > _LARGE_BYTES else _TOKENS
    count = min(count, *(layer.window_size for layer in job.plan.layers))
    vocab_size = job.source.config.vocab_size
    tokens = np.random.default_rng(_SEED).integers(0, vocab_size, count)
    found = _graph_logits(job, folder, tokens)
    wanted = _stock_logits(job, tokens, torch.float32)
    routed = bool(experts_per_token(job.source.config))
    error = _Error.of(found, wanted, routed=routed)
    if job.quantize is not None or job.kv_cache_dtype is not None:
        _require(error.relative, _QUANTIZED_LIMIT, count, "of their standard deviation")
        return
    limit = max(_LIMIT, _STEPS * torch.finfo(torch_dtype(job.dtype)).eps)
    if error.largest > limit and job.dtype != "float32":
        low = _stock_logits(job, tokens, torch_dtype(job.dtype))
        rounding = _Error.of(low, wanted, routed=routed).largest
        limit = min(max(limit, _FACTOR * rounding), _MOST)
    _require(error.largest, limit, count, "of their range")


def _require(error: float, limit: float, count: int, of: str) -> None:
    if error <= limit:  # not NaN
        return
    raise ExportError(
        f"the written graph is not the model: over {count} tokens its logits are {error:.2g} {of} "
        f"from those of transformers, at most {limit:.2g} is rounding; nothing was written "
        f"(--no-check leaves this comparison out)"
    )


def _graph_logits(job: ExportJob, folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits (T, V) of the written graph, rotated as short texts are.

    In float32 where its type does not run.
    """
    short, is_low = _short_plan(job), job.dtype == "bfloat16"
    graph = None
    if short is not None or is_low:
        model = onnx.load(str(folder / job.target.graph_name), load_external_data=False)
        if short is not None:
            rotate_as(model, short, _TABLES)
        if is_low:
            widen(model, (onnx.TensorProto.BFLOAT16,))
            job = replace(job, dtype="float32")
        graph = model.SerializeToString()
    bundle = Bundle(folder, job.manifest())
    session = OnnxRuntimeSession(bundle, graph=graph, lean=True)
    loaded = LanguageModel(bundle, session)
    logits = loaded.forward(tokens[None], loaded.new_state())
    assert logits is not None
    return logits[0]


def _short_plan(job: ExportJob) -> AttentionPlan | None:
    """Return the plan by the rotation of short texts; None where the rotation has no regimes."""
    try:
        return job.family.plan(job.source.config, replace(job.settings, rope_regime="short"))
    except ConfigError:
        return None


def _stock_logits(
    job: ExportJob, tokens: NDArray[np.int64], dtype: torch.dtype
) -> NDArray[np.float32]:
    """Return the logits (T, V) of the unmodified model."""
    model = stock_model(job.checkpoint, dtype)
    hidden = model.hidden_states(torch.from_numpy(tokens))
    return model.logits(hidden).to(torch.float32).numpy()
