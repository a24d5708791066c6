"""The result of a perplexity evaluation: for each method its perplexities by bucket."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.bundle.folder import Bundle
from lminf_export.evaluate.buckets import Bucket, estimate, ratio
from lminf_export.evaluate.perplexity_options import LABELS, LAMBDA, Options
from lminf_export.evaluate.resume_file import ResumeFile, Track
from lminf_export.evaluate.text import TokenStream
from lminf_export.runtime.environment import describe_bundle, environment


def make_result(
    bundle: Bundle,
    stream: TokenStream,
    buckets: list[Bucket],
    resume: ResumeFile,
    options: Options,
    repeat: bool,
) -> dict[str, Any]:
    """Return the result as JSON can hold it."""
    manifest = bundle.manifest
    methods = {
        name: _method(name, resume, stream, buckets)
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
    name: str, resume: ResumeFile, stream: TokenStream, buckets: list[Bucket]
) -> dict[str, Any]:
    track = resume.tracks[name]
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
            own = resume.tracks[LAMBDA].losses[span][known]
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
