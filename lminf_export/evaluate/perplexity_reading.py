"""Reads a stream with one method after the other, within a budget, and saves what is done."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import psutil

from lminf_export.bundle.files import human_bytes
from lminf_export.evaluate.buckets import Bucket
from lminf_export.evaluate.perplexity_options import LABELS, Options
from lminf_export.evaluate.resume_file import ResumeFile, Track
from lminf_export.evaluate.scorers import Scorer
from lminf_export.evaluate.text import TokenStream
from lminf_export.progress import Progress

SAVE_SECONDS = 20.0
# The share of the free memory a full cache may take.
MEMORY_SHARE = 0.4


def read_with(
    name: str,
    scorer: Scorer,
    stream: TokenStream,
    resume: ResumeFile,
    budget: float | None,
    progress: Progress,
) -> None:
    """Read the stream with one method, from where its track stands; save now and then."""
    total = len(stream.ids) - 1
    track = resume.track(name, len(stream.ids))
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
        if resume.path is not None and now - saved > SAVE_SECONDS:
            track.snapshot = scorer.snapshot()
            resume.save()
            saved = time.monotonic()
    if resume.path is not None:
        track.snapshot = scorer.snapshot()


def _over_budget(scorer: Scorer, track: Track, budget: float | None) -> str:
    """Return why a comparison has to stop, or an empty text."""
    if budget is None:
        return ""
    if track.seconds > budget:
        return f"time budget of {budget:g} s"
    room = MEMORY_SHARE * psutil.virtual_memory().available
    if scorer.nbytes > room:
        return f"memory: the cache takes {human_bytes(scorer.nbytes)}"
    return ""


def read_recomputing(
    torch_model: Any,
    stream: TokenStream,
    buckets: list[Bucket],
    resume: ResumeFile,
    options: Options,
    progress: Progress,
) -> None:
    """Score the sampled targets that are not known yet."""
    from lminf_export.evaluate.torch_scorers import recompute

    name = "recompute"
    track = resume.track(name, len(stream.ids))
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
            resume.save()
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
