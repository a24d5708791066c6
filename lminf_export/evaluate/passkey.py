"""The passkey task on a bundle: whether a key is retrieved, by text length and depth of the key.

Source: arXiv 2308.16137, section 4.3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lminf_export.errors import InputError
from lminf_export.evaluate.passkey_text import Passkey, compose
from lminf_export.evaluate.retrieval import (
    DEPTHS,
    DISTRACTORS,
    FACTORS,
    TRIALS,
    Instance,
    answer_ids,
    evaluate_task,
    fitted,
    placed,
    token_ranges,
)
from lminf_export.operator.settings import as_integer
from lminf_export.progress import Progress, silent
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.options import Provider
from lminf_export.runtime.text import TextCodec

KEY_DIGITS = 5


def evaluate_passkey(
    bundle: str | Path,
    *,
    factors: Sequence[float] = FACTORS,
    depths: Sequence[float] = DEPTHS,
    trials: int = TRIALS,
    distractors: int = DISTRACTORS,
    seed: int = 0,
    provider: Provider = "cpu",
    threads: int | None = None,
    kernels: str | Path = AUTO,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure whether a bundle retrieves keys hidden in filler text.

    Args:
        bundle: the bundle's folder.
        factors: lengths of the text in windows.
        depths: where the key is, 0 (behind the header) … 1 (before the question).
        trials: keys for each length and depth.
        distractors: other keys the right one is ranked among, by likelihood.
        seed: of keys and distractors.
        provider: onnxruntime's provider.
        threads: threads of one operator.
        kernels: what computes Λ-attention in onnxruntime: see `load`.
        progress: called with each phase and its fraction.

    Returns:
        The result as JSON can hold it: for each length and depth, exact answers and ranks.

    Raises:
        InputError: a setting outside its rule.
        BundleError: the bundle is damaged, or has no tokenizer.
    """
    if as_integer("distractors", distractors, 1, InputError) >= 10**KEY_DIGITS:
        raise InputError(f"distractors={distractors}: there are {10**KEY_DIGITS} keys")
    return evaluate_task(
        "passkey", make_instance, bundle, factors=factors, depths=depths, trials=trials,
        distractors=distractors, seed=seed, provider=provider, threads=threads, kernels=kernels,
        progress=progress,
    )  # fmt: skip


def make_instance(
    model: LanguageModel, length: int, depth: float, distractors: int, dice: random.Random
) -> Instance:
    """Compose a text of at most ``length`` tokens (or the shortest there is) and its candidates."""
    codec = model.codec
    keys = _distinct_keys(distractors + 1, dice)
    task, prompt = _fit(codec, keys[0], length, depth)
    candidates = [answer_ids(codec, task.prompt, f" {key}") for key in keys]
    mentions = token_ranges(codec, task.prompt, task.key)
    return placed(model.bundle.manifest.lambda_config, mentions, prompt, candidates)


def _distinct_keys(count: int, dice: random.Random) -> list[str]:
    return [f"{key:0{KEY_DIGITS}d}" for key in dice.sample(range(10**KEY_DIGITS), count)]


def _fit(codec: TextCodec, key: str, length: int, depth: float) -> tuple[Passkey, list[int]]:
    """Find as many filler sentences as fit into ``length`` tokens, and split them at the depth."""

    def made(count: int) -> tuple[Passkey, list[int]]:
        before = round(depth * count)
        task = compose(key, before, count - before)
        return task, codec.encode(task.prompt)

    return fitted(made, 0, max(1, length), length)  # a sentence has more than one token
