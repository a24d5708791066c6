"""Does a bundle compute what the specification says? Measured, token by token and in chunks.

The reference is the model's own code with `reference.attend_by_distance` for its attention, in
float64, with the weights read back from the bundle (or from the original model). It has no
ring, no digits and no ONNX: an agreement is an agreement of two different computations.

Neither all weights of the reference nor all logits are ever in memory together: the stream passes
the reference layer by layer, and logits are compared a block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.errors import InputError
from lminf_export.models.registry import family_of
from lminf_export.progress import Progress, silent
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.mapped_weights import few_resident_pages
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from lminf_export.runtime.options import Provider
from lminf_export.verify.bundle_weights import reference_checkpoint
from lminf_export.verify.estimate import estimate
from lminf_export.verify.logits_comparison import (
    Stream,
    compare_dense,
    compare_routed,
    compare_with_stock,
    losses_of,
    routing_watch,
)
from lminf_export.verify.options import DEFAULT_MAX_HOURS
from lminf_export.verify.perplexity_cost import cost_of
from lminf_export.verify.reference_model import Reference, bundle_plan, rounding_of
from lminf_export.verify.report import ValidationReport
from lminf_export.verify.rewritten import require_comparable
from lminf_export.verify.same_model import check_same_model, check_weights_fit
from lminf_export.verify.small_window import SmallWindow, largest_window, tested_window, with_window
from lminf_export.verify.stream import make_stream, notes_on
from lminf_export.verify.tolerance import Precision
from lminf_export.verify.weights_comparison import differing_weights

REFERENCE_DTYPE = torch.float64


def validate(
    bundle: str | Path,
    *,
    model: str | None = None,
    lora: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    window: int | None = None,
    num_tokens: int | None = None,
    token_ids: Sequence[int] | None = None,
    seed: int = 0,
    provider: Provider = "cpu",
    kernels: str | Path = AUTO,
    max_hours: float = DEFAULT_MAX_HOURS,
    progress: Progress = silent,
) -> ValidationReport:
    """Run a bundle token by token and in uneven chunks, and compare every logit.

    Args:
        bundle: the bundle's folder, or its plan to measure that; every file is hashed first.
        model: original model (folder, GGUF file or hub id) to take the reference's weights from,
            instead of reading them back from the bundle; every weight is compared with it too. The
            reference of a quantised bundle has its own weights, dequantised, in any case: that
            is what the graph must compute; the original model tells what quantisation costs.
        lora: the adapter that was merged into the bundle, to merge into `model` too.
        allow_pickle: read `.bin` weights of the model and the adapter.
        trust_remote_code: run Python that the model's repository, or the bundle, brings.
        window: largest window of a layer in the test, at most the bundle's own: a smaller one
            wraps the rings within fewer tokens. By default the bundle's own up to 512 tokens,
            a smaller one where that would take long.
        num_tokens: length of the stream; by default just over 4 windows.
        token_ids: the stream itself, a text's tokens; random tokens by default.
        seed: of the random tokens.
        provider: onnxruntime's provider, "cpu" or "cuda".
        kernels: what computes attention in onnxruntime: see `load`.
        max_hours: a validation that is expected to take longer is refused.
        progress: told what is going on.

    Raises:
        BundleError: the bundle is damaged.
        InputError: a window or a stream that cannot be tested, more memory or time than there is,
            or an adapter without a model or the reverse.
        ModelError: the reference cannot be built.
    """
    progress("checking files", None)
    opened = Bundle.open(bundle, verify="full")
    require_comparable(opened.manifest, model)
    _check_adapter(opened, model, lora)
    small = with_window(opened, tested_window(bundle, opened, window))
    manifest = small.bundle.manifest
    tokens = make_stream(manifest, num_tokens, token_ids, seed)
    language_model = _load(bundle, small, provider, kernels)
    source = open_source(
        model if model is not None else opened.path,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    family = family_of(source.config)
    names_its_weights = opened.manifest.source.rewritten is None
    if model is not None and names_its_weights:
        check_same_model(opened, source)
    original = open_checkpoint(source, lora, allow_pickle=allow_pickle)
    plan = small.plan(bundle_plan(opened, family, original))
    differing = None
    if model is not None:
        check_weights_fit(original)
    if model is not None and names_its_weights:
        progress("comparing weights", None)
        differing = differing_weights(opened, original)
    watch = routing_watch(language_model, original)
    if watch is not None:
        language_model = LanguageModel(small.bundle, watch.session)
    quantization = manifest.quantization
    measurable = model is not None if quantization is not None else manifest.contract.int8_cache
    with_cost = measurable and token_ids is not None
    checkpoint = reference_checkpoint(opened, original)
    dtypes = [REFERENCE_DTYPE, *Precision(small.bundle).yardstick_dtypes()]
    dtypes += [torch.float32] if with_cost else []
    dtypes += [REFERENCE_DTYPE] if manifest.contract.int8_cache else []
    apart = watch is not None or manifest.contract.int8_cache
    stream = Stream(language_model, tokens, progress)
    reference = Reference(checkpoint, family, plan, tokens, progress, rounding_of(opened))
    with few_resident_pages(opened):
        progress("estimating time and memory", None)
        expected = estimate(language_model, checkpoint, len(tokens), dtypes, apart=apart)
        expected.require_room(max_hours)
        progress(expected.description, None)
        if watch is not None:
            watch.clear()
        if watch is None:
            found = compare_dense(stream, reference, REFERENCE_DTYPE)
        else:
            found = compare_routed(stream, reference, REFERENCE_DTYPE, watch)
        stock = compare_with_stock(reference, REFERENCE_DTYPE, small, found.exact)
        cost = None
        if with_cost:
            full = Reference(original, family, plan, tokens, progress).logits(torch.float32)
            cost = cost_of(losses_of(full, stream), found.losses)
    return ValidationReport(
        bundle=opened.path.resolve().name,
        dtype=manifest.dtype,
        window_size=opened.manifest.settings.window_size,
        reference_dtype=str(REFERENCE_DTYPE).removeprefix("torch."),
        comparisons=(*found.comparisons, stock),
        differing_weights=differing,
        compared_with=None if model is None else _named(original),
        quantization=quantization.description if quantization is not None else None,
        kv_cache_dtype=manifest.kv_cache_dtype,
        perplexity_cost=cost,
        routing=tuple(found.routing),
        rings=tuple(found.rings),
        ring_cost=found.ring_cost,
        tested_window=largest_window(manifest),
        notes=notes_on(manifest, largest_window(opened.manifest), len(tokens)),
    )


def _load(
    path: str | Path, small: SmallWindow, provider: Provider, kernels: str | Path
) -> LanguageModel:
    if small.graph is None:
        return load(path, provider=provider, kernels=kernels)
    session = OnnxRuntimeSession(
        small.bundle, provider=provider, kernels=kernels, graph=small.graph
    )
    return LanguageModel(small.bundle, session)


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
