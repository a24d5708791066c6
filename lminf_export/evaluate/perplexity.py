"""Perplexity by position: a text of any length through a bundle, and beside it the alternatives."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.folder import Bundle
from lminf_export.errors import InputError
from lminf_export.evaluate.buckets import Bucket, estimate, log_buckets, ratio
from lminf_export.evaluate.progress_file import ProgressFile, Track
from lminf_export.evaluate.scorers import BundleScorer, Scorer
from lminf_export.evaluate.text import TokenStream, read_stream
from lminf_export.operator.settings import as_integer
from lminf_export.progress import Progress, silent
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.load import load
from lminf_export.runtime.session import Provider

LAMBDA = "lambda"
LABELS = {
    LAMBDA: "Λ export, bounded cache (onnxruntime)",
    "stock": "unmodified model, full cache (torch)",
    "window": "sliding window, no sinks (torch)",
    "streaming": "StreamingLLM, positions by cache index (torch)",
    "recompute": "last W tokens read afresh for each target (torch)",
    "reference": "Λ by the specification (torch)",
}
COMPARISONS = tuple(name for name in LABELS if name != LAMBDA)
DEFAULT_TARGETS = 2000
DEFAULT_BUDGET_SECONDS = 600.0
SAVE_SECONDS = 20.0
# The share of the free memory a full cache may take.
MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Options:
    """How an evaluation is run.

    Attributes:
        compare: names out of COMPARISONS.
        model: original model the comparisons take their weights from; the bundle's by default.
        targets: sampled targets of each bucket for "recompute".
        budget_seconds: time each comparison may take.
        buckets_per_octave: buckets for each doubling of the context.
        seed: of the sampled targets.
    """

    compare: tuple[str, ...] = ()
    model: str | None = None
    targets: int = DEFAULT_TARGETS
    budget_seconds: float = DEFAULT_BUDGET_SECONDS
    buckets_per_octave: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.compare:
            if name not in COMPARISONS:
                raise InputError(
                    f"unknown comparison {name!r}; there are: {', '.join(COMPARISONS)}"
                )
        as_integer("targets", self.targets, 1, InputError)
        as_integer("buckets_per_octave", self.buckets_per_octave, 1, InputError)
        if not self.budget_seconds > 0:
            raise InputError(f"budget_seconds={self.budget_seconds}: must be above 0")


def evaluate_perplexity(
    bundle: str | Path,
    files: Sequence[str | Path],
    *,
    max_tokens: int | None = None,
    repeat: bool = False,
    start_tokens: bool = True,
    options: Options | None = None,
    state_file: str | Path | None = None,
    provider: Provider = "cpu",
    threads: int | None = None,
    kernels: str | Path = AUTO,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stream texts through a bundle and say how well it predicts them, by context length.

    Args:
        bundle: the bundle's folder.
        files: UTF-8 texts, read one after the other as one stream.
        max_tokens: where to stop; the end of the text by default.
        repeat: read the text again and again until max_tokens.
        start_tokens: whether the tokenizer's start tokens come first.
        options: comparisons and their settings.
        state_file: keep what is done there, and go on from it.
        provider: onnxruntime's provider.
        threads: threads of one operator, in onnxruntime and torch.
        kernels: what computes Λ-attention in onnxruntime: see `load`.
        progress: told what is going on.

    Returns:
        The result as JSON can hold it: buckets, and for each method its perplexities.

    Raises:
        InputError: a text or a setting that cannot be used.
        BundleError: the bundle is damaged, or has no tokenizer.
    """
    options = options or Options()
    opened = Bundle.open(bundle)
    model = load(opened.path, provider=provider, threads=threads, kernels=kernels)
    progress("tokenizing", None)
    stream = read_stream(
        model.codec, files, max_tokens=max_tokens, repeat=repeat, start_tokens=start_tokens
    )
    kept = ProgressFile.open(
        None if state_file is None else Path(state_file),
        {
            "bundle": opened.manifest.manifest_sha256,
            "text": stream.sha256,
            "start tokens": stream.num_start_tokens,
            "repetition": repeat,
            "model": options.model or "",
        },
    )
    buckets = log_buckets(
        len(stream.ids), opened.manifest.training_length, options.buckets_per_octave
    )
    with ExitStack() as stack:
        stack.callback(kept.save)
        _read(LAMBDA, BundleScorer(model), stream, kept, None, progress)
        if options.compare:
            _compare(opened, stream, buckets, kept, options, threads, progress)
    result = _result(opened, stream, buckets, kept, options, repeat)
    return {**result, "attention": model.session.attention}


def _compare(
    bundle: Bundle,
    stream: TokenStream,
    buckets: list[Bucket],
    kept: ProgressFile,
    options: Options,
    threads: int | None,
    progress: Progress,
) -> None:
    import torch

    from lminf_export.evaluate import torch_scorers

    if threads is not None:
        torch.set_num_threads(threads)

    progress("loading the model in torch", None)
    torch_model = torch_scorers.TorchModel(bundle, options.model)
    makers: dict[str, Callable[[torch_scorers.TorchModel], Scorer]] = {
        "stock": torch_scorers.stock_scorer,
        "window": torch_scorers.window_scorer,
        "streaming": torch_scorers.streaming_scorer,
        "reference": torch_scorers.ReferenceScorer,
    }
    for name in dict.fromkeys(options.compare):
        if name == "recompute":
            _recompute(torch_model, stream, buckets, kept, options, progress)
        else:
            scorer = makers[name](torch_model)
            _read(name, scorer, stream, kept, options.budget_seconds, progress)


def _read(
    name: str,
    scorer: Scorer,
    stream: TokenStream,
    kept: ProgressFile,
    budget: float | None,
    progress: Progress,
) -> None:
    """Read the stream with one method, from where its track stands; save now and then."""
    total = len(stream.ids) - 1
    track = kept.track(name, len(stream.ids))
    if track.done >= total:
        return
    if track.snapshot is not None:
        scorer.restore(track.snapshot)
    else:
        track.done, track.seconds = 0, 0.0
    track.stopped = ""
    saved = time.monotonic()
    while track.done < total:
        progress(LABELS[name], track.done / total)
        track.stopped = _over_budget(scorer, track, budget)
        if track.stopped:
            break
        start = track.done
        stop = min(start + scorer.chunk_size, total)
        began = time.monotonic()
        losses = scorer.score(stream.ids[start:stop], stream.ids[start + 1 : stop + 1])
        now = time.monotonic()
        track.seconds += now - began
        track.losses[start + 1 : stop + 1] = losses
        track.done, track.snapshot = stop, None
        track.nbytes = max(track.nbytes, scorer.nbytes)
        if kept.path is not None and now - saved > SAVE_SECONDS:
            track.snapshot = scorer.snapshot()
            kept.save()
            saved = time.monotonic()
    if kept.path is not None:
        track.snapshot = scorer.snapshot()


def _over_budget(scorer: Scorer, track: Track, budget: float | None) -> str:
    """Say why a comparison has to stop, or nothing."""
    if budget is None:
        return ""
    if track.seconds > budget:
        return f"time budget of {budget:g} s"
    room = MEMORY_SHARE * psutil.virtual_memory().available
    if scorer.nbytes > room:
        return f"memory: the cache takes {human_bytes(scorer.nbytes)}"
    return ""


def _recompute(
    torch_model: Any,
    stream: TokenStream,
    buckets: list[Bucket],
    kept: ProgressFile,
    options: Options,
    progress: Progress,
) -> None:
    """Score the sampled targets that are not known yet."""
    from lminf_export.evaluate.torch_scorers import recompute

    name = "recompute"
    track = kept.track(name, len(stream.ids))
    wanted = sampled_targets(stream, buckets, options.targets, options.seed)
    left = [target for target in wanted if np.isnan(track.losses[target])]
    track.stopped = ""
    began = saved = time.monotonic()
    before = track.seconds
    scored = recompute(
        torch_model, stream.ids, stream.num_start_tokens, left, torch_model.window_size
    )
    for targets, losses in scored:
        track.losses[targets] = losses
        track.done = int(np.count_nonzero(~np.isnan(track.losses)))
        now = time.monotonic()
        track.seconds = before + now - began
        progress(LABELS[name], track.done / len(wanted))
        if track.seconds > options.budget_seconds and track.done < len(wanted):
            track.stopped = f"time budget of {options.budget_seconds:g} s"
            break
        if now - saved > SAVE_SECONDS:
            kept.save()
            saved = time.monotonic()


def sampled_targets(stream: TokenStream, buckets: list[Bucket], count: int, seed: int) -> list[int]:
    """Draw up to ``count`` targets of each bucket, ascending; start tokens are none."""
    found: list[int] = []
    for bucket in buckets:
        dice = np.random.default_rng((seed, bucket.low))
        places = np.arange(max(bucket.low + 1, stream.num_start_tokens), bucket.high + 1)
        drawn = dice.choice(places, min(count, len(places)), replace=False)
        found += sorted(drawn.tolist())
    return found


def _result(
    bundle: Bundle,
    stream: TokenStream,
    buckets: list[Bucket],
    kept: ProgressFile,
    options: Options,
    repeat: bool,
) -> dict[str, Any]:
    manifest = bundle.manifest
    methods = {
        name: _method(name, kept, stream, buckets)
        for name in (LAMBDA, *dict.fromkeys(options.compare))
    }
    return {
        "evaluation": "perplexity",
        **describe_bundle(manifest),
        "texts": list(stream.names),
        "text_sha256": stream.sha256,
        "text_tokens": stream.text_tokens,
        "repeated": repeat,
        "tokens": len(stream.ids),
        "start_tokens": stream.num_start_tokens,
        "weights_of_comparisons": options.model or "bundle",
        "sampled_targets": options.targets if "recompute" in options.compare else None,
        "seed": options.seed,
        "buckets": [[bucket.low + 1, bucket.high] for bucket in buckets],
        "methods": methods,
        **environment(),
    }


def _method(
    name: str, kept: ProgressFile, stream: TokenStream, buckets: list[Bucket]
) -> dict[str, Any]:
    track = kept.tracks[name]
    rows: list[dict[str, Any] | None] = []
    for bucket in buckets:
        known = _known(track, stream, bucket)
        if not known.any():
            rows.append(None)
            continue
        span = slice(bucket.low + 1, bucket.high + 1)
        losses = track.losses[span][known]
        row = estimate(losses).to_dict()
        if name != LAMBDA:
            own = kept.tracks[LAMBDA].losses[span][known]
            row["lambda_on_the_same_targets"] = float(np.exp(own.mean(dtype=np.float64)))
            row["lambda_over_this"] = ratio(own, losses)
        rows.append(row)
    return {
        "label": LABELS[name],
        "tokens_read": track.done,
        "seconds": round(track.seconds, 2),
        "cache_bytes": track.nbytes or None,
        "stopped": track.stopped or None,
        "perplexity": _overall(track, stream),
        "by_bucket": rows,
    }


def _known(track: Track, stream: TokenStream, bucket: Bucket) -> NDArray[np.bool_]:
    """Which positions of a bucket have a loss and are text."""
    known = ~np.isnan(track.losses[bucket.low + 1 : bucket.high + 1])
    known[: max(0, stream.num_start_tokens - bucket.low - 1)] = False
    return known


def _overall(track: Track, stream: TokenStream) -> dict[str, Any] | None:
    losses = track.losses[max(1, stream.num_start_tokens) :]
    losses = losses[~np.isnan(losses)]
    return estimate(losses).to_dict() if len(losses) else None
