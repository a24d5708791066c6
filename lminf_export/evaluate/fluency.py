"""Repetition, variety and perplexity of a generated text, by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import InputError
from lminf_export.evaluate.buckets import estimate
from lminf_export.evaluate.scorers import BundleScorer
from lminf_export.evaluate.text import read_stream, special_prefix
from lminf_export.operator.settings import as_integer
from lminf_export.progress import Progress, silent
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.options import Provider

DEFAULT_TOKENS = 100_000
DEFAULT_SEGMENT = 5000
ORDERS = (1, 2, 3, 4)
# A token equal to one of the last NEAR tokens is a near repetition (Welleck et al. 2020).
NEAR = 128


def evaluate_generation(
    bundle: str | Path,
    prompt: str | None,
    *,
    num_tokens: int = DEFAULT_TOKENS,
    segment: int = DEFAULT_SEGMENT,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    reference: Sequence[str | Path] = (),
    provider: Provider = "cpu",
    threads: int | None = None,
    kernels: str | Path = AUTO,
    progress: Progress = silent,
) -> tuple[dict[str, Any], str]:
    """Generate a long text with a bundle, and measure it segment by segment.

    Args:
        bundle: the bundle's folder.
        prompt: what it continues; the tokenizer's start token alone if None.
        num_tokens: how much it writes; an end-of-text token does not end it.
        segment: tokens of a segment.
        temperature: see `SamplingConfig`.
        top_p: see `SamplingConfig`.
        seed: of the sampling.
        reference: texts written by humans, measured in the same way.
        provider: onnxruntime's provider.
        threads: threads of one operator.
        kernels: what computes Λ-attention in onnxruntime: see `load`.
        progress: called with each phase and its fraction.

    Returns:
        The result as JSON can hold it, and the text.

    Raises:
        InputError: a setting or a text that cannot be used.
        BundleError: the bundle is damaged, or has no tokenizer.
    """
    as_integer("segment", segment, 2 * max(ORDERS), InputError)
    if as_integer("num_tokens", num_tokens, 1, InputError) < segment:
        raise InputError(f"num_tokens={num_tokens}: must be at least one segment of {segment}")
    model = load(bundle, provider=provider, threads=threads, kernels=kernels)
    manifest = model.bundle.manifest
    first = _prompt_ids(model, prompt)
    ids = list(first)
    written = model.generate(
        first, max_new_tokens=num_tokens, temperature=temperature, top_p=top_p, seed=seed,
        stop_token_ids=(),
    )  # fmt: skip
    for count, token in enumerate(written):
        ids.append(token)
        if count % 256 == 0:
            progress("writing", count / num_tokens)
    stream = np.array(ids, np.int64)
    losses = _losses(model, stream, progress, "scoring")
    rows = describe_segments(stream[len(first) :], losses[len(first) :], segment)
    result = {
        "evaluation": "generation",
        **describe_bundle(manifest),
        "attention": model.session.attention,
        "prompt_tokens": len(first),
        "tokens": num_tokens,
        "segment": segment,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "segments": rows,
        "reference": _reference(model, reference, segment, progress) if reference else None,
        **environment(),
    }
    return result, model.codec.tokenizer.decode(ids)


def describe_segments(
    ids: NDArray[np.int64], losses: NDArray[np.float32], segment: int
) -> list[dict[str, Any]]:
    """Measure whole segments of a text: (n,) ids and the nats of each."""
    rows = []
    for start in range(0, len(ids) - segment + 1, segment):
        part = ids[start : start + segment]
        rows.append(
            {
                "from": start + 1,
                "to": start + segment,
                **estimate(losses[start : start + segment]).to_dict(),
                "distinct": {str(n): distinct(part, n) for n in ORDERS},
                "near_repetition": near_repetition(part),
                "longest_repeat": longest_repeat(part),
            }
        )
    return rows


def distinct(ids: NDArray[np.int64], order: int) -> float:
    """Return distinct-n: different n-grams over all n-grams (Li et al. 2016)."""
    grams = np.lib.stride_tricks.sliding_window_view(ids, order)
    return len(np.unique(grams, axis=0)) / len(grams)


def near_repetition(ids: NDArray[np.int64]) -> float:
    """Return the share of tokens that are among the NEAR tokens before them."""
    last: dict[int, int] = {}
    hits = 0
    for position, token in enumerate(ids.tolist()):
        hits += position - last.get(token, -NEAR - 1) <= NEAR
        last[token] = position
    return hits / len(ids)


def longest_repeat(ids: NDArray[np.int64]) -> int:
    """Return the length of the longest run of tokens that occurs twice in a text."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high + 1) // 2
        grams = np.lib.stride_tricks.sliding_window_view(ids, middle)
        seen: set[bytes] = set()
        found = False
        for gram in grams:
            key = gram.tobytes()
            if key in seen:
                found = True
                break
            seen.add(key)
        low, high = (middle, high) if found else (low, middle - 1)
    return low


def _prompt_ids(model: LanguageModel, prompt: str | None) -> list[int]:
    if prompt is not None:
        return model.codec.encode(prompt)
    first = special_prefix(model.codec)
    if not first:
        raise InputError("this tokenizer has no start token to begin with; give --prompt TEXT")
    return first


def _losses(
    model: LanguageModel, ids: NDArray[np.int64], progress: Progress, phase: str
) -> NDArray[np.float32]:
    """Return the nats of each token (n,) but the first, which has none (0)."""
    scorer = BundleScorer(model)
    losses = np.zeros(len(ids), np.float32)
    for start in range(0, len(ids) - 1, scorer.chunk_size):
        stop = min(start + scorer.chunk_size, len(ids) - 1)
        losses[start + 1 : stop + 1] = scorer.score(ids[start:stop], ids[start + 1 : stop + 1])
        progress(phase, stop / len(ids))
    return losses


def _reference(
    model: LanguageModel, files: Sequence[str | Path], segment: int, progress: Progress
) -> dict[str, Any]:
    stream = read_stream(model.codec, files)
    first = stream.num_start_tokens
    if len(stream.ids) - first < segment:
        raise InputError(
            f"the reference text has {len(stream.ids) - first} tokens, fewer than a segment of "
            f"{segment}"
        )
    losses = _losses(model, stream.ids, progress, "scoring the reference text")
    return {
        "texts": list(stream.names),
        "segments": describe_segments(stream.ids[first:], losses[first:], segment),
    }
