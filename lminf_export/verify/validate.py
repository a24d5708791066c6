"""Does a bundle compute what the specification says? Measured, token by token and in chunks.

The reference is the model's own code with `reference.attend_by_distance` for its attention, in
float64, with the weights read back from the bundle (or from the original model). It has no
ring, no digits and no ONNX: an agreement is an agreement of two different computations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.errors import InputError, ModelError
from lminf_export.models.registry import find_family
from lminf_export.progress import Progress, silent
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.options import Provider
from lminf_export.verify.logits_comparison import (
    BundleRun,
    compare_dense,
    compare_routed,
    compare_with_stock,
    routing_watch,
)
from lminf_export.verify.perplexity_cost import perplexity_cost
from lminf_export.verify.reference_model import (
    Reference,
    bundle_plan,
    reference_checkpoint,
    rounding_of,
)
from lminf_export.verify.report import ValidationReport
from lminf_export.verify.routing_check import RoutingReport
from lminf_export.verify.same_model import check_same_model, check_weights_fit
from lminf_export.verify.stream import make_stream
from lminf_export.verify.weights_comparison import differing_weights


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
        bundle: the bundle's folder, or its plan to measure that; every file is hashed first.
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
    tokens = make_stream(opened.manifest, num_tokens, token_ids, seed)
    language_model = load(bundle, provider=provider, kernels=kernels)
    family = find_family(opened.manifest.model_type)
    source = open_source(model if model is not None else opened.path, allow_pickle=allow_pickle)
    if model is not None:
        check_same_model(opened, source)
    original = open_checkpoint(source, lora, allow_pickle=allow_pickle)
    plan = bundle_plan(opened, family, original)
    differing = None
    if model is not None:
        check_weights_fit(original)
        progress("comparing weights", None)
        differing = differing_weights(opened, original)
    dtype = _reference_dtype(original)
    watch = routing_watch(language_model, original)
    if watch is not None:
        language_model = LanguageModel(opened, watch.session)
    run = BundleRun(language_model, tokens, progress)
    routing: list[RoutingReport] = []
    with reference_checkpoint(opened, original) as checkpoint:
        reference = Reference(checkpoint, family, plan, tokens, progress, rounding_of(opened))
        if watch is None:
            comparisons, logits = compare_dense(run, reference, dtype)
        else:
            comparisons, logits, routing = compare_routed(run, reference, dtype, watch)
        comparisons.append(compare_with_stock(reference, dtype, opened))
    cost, quantization = None, opened.manifest.quantization
    measurable = (
        model is not None if quantization is not None else opened.manifest.contract.int8_cache
    )
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
