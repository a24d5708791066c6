"""Does a bundle compute what the specification says? Measured, token by token and in chunks.

The reference is the model's own code with `reference.attend_by_distance` for its attention, in
float64, with the weights read back from the bundle (or from the original model). It has no
ring, no digits and no ONNX: an agreement is an agreement of two different computations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.checkpoint.opening import Checkpoint, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.errors import InputError, ModelError
from lminf_export.models.registry import find_family
from lminf_export.operator.reference_int8 import INT8_LIMIT, round_to_int8
from lminf_export.progress import Progress, silent
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.session import Provider
from lminf_export.verify.bundle_weights import bundle_weights, is_made_of, with_tied_names
from lminf_export.verify.comparison import Comparison, Logits, compare, run_in_pieces
from lminf_export.verify.perplexity_cost import perplexity_cost
from lminf_export.verify.reference_model import (
    Reference,
    bundle_plan,
    reference_checkpoint,
    rounding_of,
)
from lminf_export.verify.report import ValidationReport
from lminf_export.verify.routing_check import (
    Routed,
    RoutingReport,
    RoutingWatch,
    compare_routing,
    experts_of,
    find_choices,
    largest_difference,
)

# The contract in float32: rounding of a few thousand terms, relative to the logits' range.
FLOAT32_TOLERANCE = 2e-5
# Lower precisions may err twice as much as torch does in that precision with the same mathematics.
LOW_PRECISION_FACTOR = 2.0
# Stock models compute angles in float32; up to here that stays below the tolerance.
STOCK_LIMIT = 1024
MIN_WINDOWS = 4
CHUNK_PATTERN = (1, 7, 31, 2, 113, 3)


def validate(
    bundle: str | Path,
    *,
    model: str | None = None,
    lora: str | Path | None = None,
    allow_pickle: bool = False,
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
        lora: the adapter that was merged into the bundle, to merge into `model` too.
        allow_pickle: read `.bin` weights of the model and the adapter.
        num_tokens: length of the stream; at least, and by default just over, 4 windows.
        token_ids: the stream itself, a text's tokens; random tokens by default.
        seed: of the random tokens.
        provider: onnxruntime's provider, "cpu" or "cuda".
        kernels: what computes attention in onnxruntime: see `load`.
        progress: told what is going on.

    Raises:
        BundleError: the bundle is damaged.
        InputError: fewer tokens than 4 windows, or an adapter without a model or the reverse.
        ModelError: the reference cannot be built, or needs more memory than there is.
    """
    progress("checking files", None)
    opened = Bundle.open(bundle, verify="full")
    _check_adapter(opened, model, lora)
    tokens = _stream(opened, num_tokens, token_ids, seed)
    family = find_family(opened.manifest.model_type)
    source = open_source(model if model is not None else opened.path, allow_pickle=allow_pickle)
    original = open_checkpoint(source, lora, allow_pickle=allow_pickle)
    plan = bundle_plan(opened, family, original)
    differing = None
    if model is not None:
        progress("comparing weights", None)
        differing = differing_weights(opened, original)
    dtype = _reference_dtype(original)
    language_model = load(opened.path, provider=provider, kernels=kernels)
    watch = _routing_watch(language_model, original)
    if watch is not None:
        language_model = LanguageModel(opened, watch.session)
    run = _Run(opened, language_model, tokens, progress)
    routing: list[RoutingReport] = []
    with reference_checkpoint(opened, original) as checkpoint:
        reference = Reference(checkpoint, family, plan, tokens, progress, rounding_of(opened))
        if watch is None:
            comparisons, logits = _compare_dense(run, reference, dtype)
        else:
            comparisons, logits, routing = _compare_routed(run, reference, dtype, watch)
        comparisons.append(_compare_with_stock(reference, dtype, opened))
    cost, quantization = None, opened.manifest.quantization
    measurable = model is not None if quantization is not None else run.int8_cache
    if measurable and token_ids is not None:
        progress("unquantised model", None)
        full = Reference(original, family, plan, tokens, progress).logits(torch.float32)
        cost = perplexity_cost(full, logits, tokens)
    return ValidationReport(
        bundle=opened.path.resolve().name,
        dtype=opened.manifest.dtype,
        window_size=opened.manifest.settings.window_size,
        reference_dtype=str(dtype).removeprefix("torch."),
        comparisons=tuple(comparisons),
        differing_weights=differing,
        compared_with=None if model is None else _named(original),
        quantization=quantization.description if quantization is not None else None,
        kv_cache_dtype=opened.manifest.kv_cache_dtype,
        perplexity_cost=cost,
        routing=tuple(routing),
    )


@dataclass(frozen=True)
class _Run:
    """A bundle and the stream it is run on."""

    bundle: Bundle
    model: LanguageModel
    tokens: NDArray[np.int64]
    progress: Progress

    def logits(self, name: str, sizes: Sequence[int]) -> Logits:
        """Logits (T, V) of the stream in pieces."""
        self.progress(name, 0.0)
        told = _told(self.progress, name)
        return run_in_pieces(self.model, self.tokens, sizes, told)

    @property
    def rounding(self) -> Bundle | None:
        """The bundle, if it lets onnxruntime round activations."""
        quantization = self.bundle.manifest.quantization
        return self.bundle if quantization is not None and quantization.rounds_activations else None

    @property
    def int8_cache(self) -> bool:
        """Whether its rings hold int8."""
        return self.bundle.manifest.contract.int8_cache

    @property
    def low_precision(self) -> torch.dtype | None:
        """The type a yardstick computes in, where a bundle computes in less than float32."""
        dtype = self.bundle.manifest.dtype
        return None if dtype == "float32" and self.rounding is None else getattr(torch, dtype)

    def yardstick(
        self, reference: Reference, dtype: torch.dtype, routed: Routed | None = None
    ) -> Any | None:
        """Logits (T, V) of a right computation that errs as the bundle may; None if it must not.

        In a lower precision, the reference in it. With rings of int8 alone, the reference with
        everything that float32 could push over a tie on the tie's other side.
        """
        if self.low_precision is not None:
            return reference.logits(self.low_precision, routed, rounding=self.rounding)
        if not self.int8_cache:
            return None
        other_side = partial(round_to_int8, tie_margin=INT8_LIMIT * FLOAT32_TOLERANCE)
        return replace(reference, rounded=other_side).logits(dtype, routed)

    def tolerance(self, yardstick: Any | None, wanted: Any) -> float:
        """Largest error that passes."""
        if yardstick is None:
            return FLOAT32_TOLERANCE
        error = compare("", yardstick, wanted, 0).max_error
        exact = self.low_precision is None
        return FLOAT32_TOLERANCE + error if exact else LOW_PRECISION_FACTOR * error


WAYS = (("token by token", (1,)), ("in uneven chunks", CHUNK_PATTERN))


def _compare_dense(
    run: _Run, reference: Reference, dtype: torch.dtype
) -> tuple[list[Comparison], Logits]:
    """Compare a bundle run in each way; return the logits of the last, too."""
    wanted = reference.logits(dtype)
    tolerance = run.tolerance(run.yardstick(reference, dtype), wanted)
    comparisons = []
    for name, sizes in WAYS:
        logits = run.logits(name, sizes)
        comparisons.append(compare(name, logits, wanted, tolerance))
    return comparisons, logits


def _compare_routed(
    run: _Run, reference: Reference, dtype: torch.dtype, watch: RoutingWatch
) -> tuple[list[Comparison], Logits, list[RoutingReport]]:
    """Compare a mixture of experts under the bundle's own routing."""
    comparisons, reports = [], []
    for name, sizes in WAYS:
        logits = run.logits(name, sizes)
        chosen = watch.take(len(run.tokens))
        routed = reference.routed(chosen)
        wanted = reference.logits(dtype, routed)
        scores = routed.all_scores()
        if len(scores) != len(chosen):  # a router that chooses in some other way
            return (*_compare_dense(run, reference, dtype), [])
        error = FLOAT32_TOLERANCE * max(_range(score) for score in scores)
        low = reference.routed(chosen)
        yardstick = run.yardstick(reference, dtype, low)
        if yardstick is not None:
            error = largest_difference(low.all_scores(), scores)
        comparisons.append(compare(name, logits, wanted, run.tolerance(yardstick, wanted)))
        reports.append(compare_routing(scores, chosen, error, reference.groups()))
    return comparisons, logits, reports


def _range(score: torch.Tensor) -> float:
    finite = score[score.isfinite()]
    return float(finite.max() - finite.min())


def _routing_watch(model: LanguageModel, original: Checkpoint) -> RoutingWatch | None:
    """Return a watch of the experts that are chosen, None if the graph chooses none."""
    if not find_choices(model.bundle):
        return None
    experts = experts_of(original.skeleton.model)
    return RoutingWatch(model.session, model.bundle) if experts else None


def _check_adapter(bundle: Bundle, model: str | None, lora: str | Path | None) -> None:
    merged = bundle.manifest.source.adapter
    if lora is not None and model is None:
        raise InputError("an adapter is compared with together with its model; give --model too")
    if model is None or (merged is None) == (lora is None):
        return
    if merged is None:
        raise InputError(f"bundle {bundle.path.name!r} has no adapter merged; leave out --lora")
    raise InputError(
        f"adapter {merged!r} is merged into bundle {bundle.path.name!r}; give it as --lora to "
        f"compare with the model and the adapter, or leave out --model to compare with the "
        f"bundle's own weights"
    )


def _named(checkpoint: Checkpoint) -> str:
    name = checkpoint.source.name
    return f"{name} with adapter {checkpoint.adapter}" if checkpoint.adapter else name


def differing_weights(bundle: Bundle, original: Checkpoint) -> tuple[str, ...]:
    """Return the bundle's tensors that are not, bit for bit, what an export makes of the source's.

    Raises:
        ModelError: the source's checkpoint is damaged or incomplete.
    """
    dtype, skeleton = bundle.manifest.dtype, original.skeleton
    converted = skeleton.conversion.apply(original.tensors)
    wanted = with_tied_names(converted, skeleton)
    return tuple(
        name
        for name, tensor in bundle_weights(bundle, skeleton).items()
        if name not in wanted or not is_made_of(name, tensor, wanted[name], dtype)
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


def _reference_dtype(original: Checkpoint) -> torch.dtype:
    """float64 where it fits into memory, else float32."""
    parameters = sum(tensor.numel() for tensor in original.skeleton.model.parameters())
    available = psutil.virtual_memory().available
    for dtype in (torch.float64, torch.float32):
        needed = parameters * dtype.itemsize * 1.3
        if needed < available:
            return dtype
    raise ModelError(
        f"the float32 reference of {original.source.name!r} needs {human_bytes(needed)} of memory, "
        f"{human_bytes(available)} is available; validate on a larger machine"
    )


def _compare_with_stock(reference: Reference, dtype: torch.dtype, bundle: Bundle) -> Comparison:
    """Compare the reference with the unmodified model where both must agree: inside the window.

    The reference's caches are exact here, whatever the bundle's are.
    """
    reference = replace(reference, rounded=None)
    count = min(bundle.manifest.settings.window_size, STOCK_LIMIT, len(reference.tokens))
    own = reference.own_routing()
    wanted = reference.logits(dtype, own, count)
    chosen = reference.routed(own.all_taken()) if own is not None and own.taken else None
    return compare(
        f"reference and stock model, first {count}",
        reference.stock_logits(count, chosen),
        wanted,
        FLOAT32_TOLERANCE,
    )


def _told(progress: Progress, name: str) -> Callable[[float], None]:
    return lambda fraction: progress(name, fraction)
