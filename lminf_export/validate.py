"""Does a bundle compute what the specification says? Measured, token by token and in chunks.

The reference is the model's own code with `reference.attend_by_distance` for its attention, in
float64, with the weights read back from the bundle (or from the original model). It has no
ring, no digits and no ONNX: an agreement is an agreement of two different computations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from lminf_export import weights
from lminf_export.bundle import Bundle
from lminf_export.conversion import Conversion
from lminf_export.errors import InputError, ModelError
from lminf_export.manifest import Manifest, human_bytes
from lminf_export.models import find_family
from lminf_export.models.base import (
    ATTENTION_NAME,
    AttentionPlan,
    Family,
    build_model,
)
from lminf_export.models.steps import HistoryStep, run
from lminf_export.progress import Progress, silent
from lminf_export.quantize.cost import PerplexityCost, perplexity_cost
from lminf_export.quantize.dequantize import (
    bundle_weights,
    is_made_of,
    quantized_names,
    rounded_activations,
    with_tied_names,
)
from lminf_export.reference_model import bundle_plan, load_torch_model, reference_source
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.onnxruntime import Provider
from lminf_export.source import Source, open_source

# The contract in float32: rounding of a few thousand terms, relative to the logits' range.
FLOAT32_TOLERANCE = 2e-5
# Lower precisions may err twice as much as torch does in that precision with the same mathematics.
LOW_PRECISION_FACTOR = 2.0
# Stock models compute angles in float32; up to here that stays below the tolerance.
STOCK_LIMIT = 1024
MIN_WINDOWS = 4
CHUNK_PATTERN = (1, 7, 31, 2, 113, 3)

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """One way of running the bundle against the reference.

    Attributes:
        name: what was compared.
        tokens: number of positions.
        max_error: largest difference of a logit, relative to the reference's range.
        mean_error: mean difference, relative to the same range.
        argmax_agreement: share of positions whose best token is the same, 0 … 1.
        tolerance: largest max_error that passes.
    """

    name: str
    tokens: int
    max_error: float
    mean_error: float
    argmax_agreement: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the largest error is within the tolerance; NaN is not."""
        return self.max_error <= self.tolerance


@dataclass(frozen=True)
class ValidationReport:
    """All comparisons of one bundle.

    Attributes:
        bundle: the bundle's folder name.
        dtype: its element type.
        window_size: W.
        reference_dtype: element type of the reference.
        comparisons: one for each way of running.
        differing_weights: tensors that are not the original model's, converted; None where no
            model was given to compare with.
        quantization: how weights are stored, in words; None where they are not quantised.
        perplexity_cost: what quantisation costs; None where there is no text or no original
            model to measure it with.
    """

    bundle: str
    dtype: str
    window_size: int
    reference_dtype: str
    comparisons: tuple[Comparison, ...]
    differing_weights: tuple[str, ...] | None = None
    quantization: str | None = None
    perplexity_cost: PerplexityCost | None = None

    @property
    def passed(self) -> bool:
        """Whether every comparison passed and no weight differs."""
        return all(row.passed for row in self.comparisons) and not self.differing_weights

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {**asdict(self), "passed": self.passed}


def validate(
    bundle: str | Path,
    *,
    model: str | None = None,
    num_tokens: int | None = None,
    token_ids: Sequence[int] | None = None,
    seed: int = 0,
    provider: Provider = "cpu",
    kernels: str | Path = AUTO,
    progress: Progress = silent,
) -> ValidationReport:
    """Run a bundle token by token and in uneven chunks, and compare every logit.

    Args:
        bundle: the bundle's folder; every file in it is hashed first.
        model: original model (folder or hub id) to take the reference's weights from, instead
            of reading them back from the bundle; every weight is compared with it too. The
            reference of a quantised bundle has its own weights, dequantised, in any case: that
            is what the graph must compute; the original model tells what quantisation costs.
        num_tokens: length of the stream; at least, and by default just over, 4 windows.
        token_ids: the stream itself, a text's tokens; random tokens by default.
        seed: of the random tokens.
        provider: onnxruntime's provider, "cpu" or "cuda".
        kernels: what computes attention in onnxruntime: see `load`.
        progress: told what is going on.

    Raises:
        BundleError: the bundle is damaged.
        InputError: fewer tokens than 4 windows.
        ModelError: the reference cannot be built, or needs more memory than there is.
    """
    progress("checking files", None)
    opened = Bundle.open(bundle, verify="full")
    language_model = load(opened.path, provider=provider, kernels=kernels)
    tokens = _stream(opened, num_tokens, token_ids, seed)
    family = find_family(opened.manifest.model_type)
    original = open_source(model if model is not None else opened.path)
    plan = bundle_plan(opened, family, original)
    differing = None
    if model is not None:
        progress("comparing weights", None)
        differing = differing_weights(opened, original)
    progress("reference", None)
    with reference_source(opened, original) as source:
        reference_dtype = _reference_dtype(source)
        wanted = _reference_logits(source, family, plan, tokens, reference_dtype, progress)
        tolerance = _tolerance(opened, source, family, plan, tokens, wanted, progress)
        comparisons = []
        for name, sizes in (("token by token", (1,)), ("in uneven chunks", CHUNK_PATTERN)):
            progress(name, 0.0)
            logits = run_in_pieces(language_model, tokens, sizes, _told(progress, name))
            comparisons.append(compare(name, logits, wanted, tolerance))
        comparisons.append(_compare_with_stock(source, tokens, wanted, opened, progress))
    cost, quantization = None, opened.manifest.quantization
    if quantization is not None and model is not None and token_ids is not None:
        del wanted
        progress("unquantised model", None)
        full = _reference_logits(original, family, plan, tokens, torch.float32, progress)
        cost = perplexity_cost(full, logits, tokens)
    return ValidationReport(
        bundle=opened.path.resolve().name,
        dtype=opened.manifest.dtype,
        window_size=opened.manifest.settings.window_size,
        reference_dtype=str(reference_dtype).removeprefix("torch."),
        comparisons=tuple(comparisons),
        differing_weights=differing,
        quantization=quantization.in_words if quantization is not None else None,
        perplexity_cost=cost,
    )


def _tolerance(
    bundle: Bundle,
    source: Source,
    family: Family,
    plan: AttentionPlan,
    tokens: NDArray[np.int64],
    wanted: Any,
    progress: Progress,
) -> float:
    """Return the error allowed: twice torch's own where a bundle computes in less than float32."""
    manifest = bundle.manifest
    exact = manifest.quantization is None or not manifest.quantization.rounds_activations
    if manifest.dtype == "float32" and exact:
        return FLOAT32_TOLERANCE
    low = getattr(torch, manifest.dtype)
    progress(f"torch in {manifest.dtype}", None)
    rounding = None if exact else bundle
    yardstick = _reference_logits(source, family, plan, tokens, low, progress, rounding)
    return LOW_PRECISION_FACTOR * compare("", yardstick, wanted, 0).max_error


def differing_weights(bundle: Bundle, source: Source) -> tuple[str, ...]:
    """Return the bundle's tensors that are not, bit for bit, what an export makes of the source's.

    Raises:
        ModelError: the source's checkpoint is damaged or incomplete.
    """
    dtype = bundle.manifest.dtype
    skeleton = build_model(source.config, getattr(torch, dtype), device="meta")
    converted = Conversion.of(skeleton).apply(weights.read_checkpoint(source.folder))
    wanted = with_tied_names(converted, skeleton)
    return tuple(
        name
        for name, tensor in bundle_weights(bundle, skeleton).items()
        if name not in wanted or not is_made_of(name, tensor, wanted[name], dtype)
    )


def run_in_pieces(
    model: LanguageModel,
    tokens: NDArray[np.int64],
    sizes: Sequence[int],
    told: Callable[[float], None] = lambda _: None,
) -> Logits:
    """Feed a stream (T,) in pieces of repeating sizes; return logits (T, V)."""
    state = model.new_state(1)
    found: list[Logits] = []
    start = 0
    for size in cycle(sizes):
        if start >= len(tokens):
            return np.concatenate(found)
        logits = model.forward(tokens[None, start : start + size], state)
        assert logits is not None
        found.append(logits[0])
        start += size
        told(min(start / len(tokens), 1.0))
    raise AssertionError("sizes must not be empty")


def compare(name: str, logits: Logits, wanted: Logits, tolerance: float) -> Comparison:
    """Compare logits (T, V) with the reference's, relative to the reference's range."""
    scale = float(wanted.max() - wanted.min())
    error = np.abs(logits.astype(np.float64) - wanted) / scale
    same = logits.argmax(-1) == wanted.argmax(-1)
    return Comparison(
        name=name,
        tokens=len(wanted),
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        argmax_agreement=float(same.mean()),
        tolerance=tolerance,
    )


def default_length(manifest: Manifest) -> int:
    """Return the tokens of a stream that nobody gave a length: a little over 4 windows."""
    return MIN_WINDOWS * manifest.settings.window_size + 17


def _stream(
    bundle: Bundle, num_tokens: int | None, token_ids: Sequence[int] | None, seed: int
) -> NDArray[np.int64]:
    manifest = bundle.manifest
    least = MIN_WINDOWS * manifest.settings.window_size + 1
    count = default_length(manifest) if num_tokens is None else num_tokens
    if token_ids is not None:
        count = len(token_ids) if num_tokens is None else min(num_tokens, len(token_ids))
    if count < least:
        raise InputError(
            f"validation needs more than {MIN_WINDOWS} windows of "
            f"{manifest.settings.window_size} tokens, at least {least}; found {count}"
        )
    if token_ids is not None:
        return np.asarray(token_ids[:count], dtype=np.int64)
    return np.random.default_rng(seed).integers(0, manifest.vocab_size, count)


def _reference_dtype(source: Source) -> torch.dtype:
    """float64 where it fits into memory, else float32."""
    stored = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    stored_width = 2 if str(getattr(source.config, "dtype", "")).endswith("16") else 4
    parameters = stored / stored_width
    available = psutil.virtual_memory().available
    for dtype in (torch.float64, torch.float32):
        needed = parameters * dtype.itemsize * 1.3
        if needed < available:
            return dtype
    raise ModelError(
        f"the float32 reference of {source.name!r} needs {human_bytes(needed)} of memory, "
        f"{human_bytes(available)} is available; validate on a larger machine"
    )


@torch.no_grad()
def _reference_logits(
    source: Source,
    family: Family,
    plan: AttentionPlan,
    tokens: NDArray[np.int64],
    dtype: torch.dtype,
    progress: Progress,
    rounding: Bundle | None = None,
) -> Any:
    """Logits (T, V) in float64 of the reference at a given precision.

    With a bundle given that lets onnxruntime round activations, so are they here.
    """
    model = load_torch_model(source, dtype, ATTENTION_NAME)
    rounded: AbstractContextManager[None] = nullcontext()
    if rounding is not None and rounding.manifest.quantization is not None:
        block_size = rounding.manifest.quantization.block_size
        rounded = rounded_activations(model, quantized_names(rounding), block_size)
    step = HistoryStep(plan)
    width = min(256, len(tokens))
    logits = []
    with family.patched(model), rounded:
        for start in range(0, len(tokens), width):
            piece = torch.from_numpy(tokens[None, start : start + width])
            step.begin(torch.tensor([piece.shape[1]]))
            rows = torch.arange(piece.shape[1])[None]
            logits.append(run(model, piece, step, rows)[0].to(torch.float64))
            progress(f"reference in {str(dtype).removeprefix('torch.')}", start / len(tokens))
    return torch.cat(logits).numpy()


@torch.no_grad()
def _compare_with_stock(
    source: Source, tokens: NDArray[np.int64], wanted: Any, bundle: Bundle, progress: Progress
) -> Comparison:
    """Compare the reference with the unmodified model where both must agree: inside the window."""
    progress("stock model", None)
    count = min(bundle.manifest.settings.window_size, STOCK_LIMIT)
    model = load_torch_model(source, torch.float32, None)
    logits = model(torch.from_numpy(tokens[None, :count]), use_cache=False).logits[0]
    return compare(
        f"reference and stock model, first {count}",
        logits.numpy(),
        wanted[:count],
        FLOAT32_TOLERANCE,
    )


def _told(progress: Progress, name: str) -> Callable[[float], None]:
    return lambda fraction: progress(name, fraction)
