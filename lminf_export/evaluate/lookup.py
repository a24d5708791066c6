"""The lookup task on a bundle: many records, and the question for the code of one.

Harder than the passkey task, since every record looks like the one asked for: a model has to find
the name, and wrong candidates are codes that stand in the same text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lminf_export.errors import InputError
from lminf_export.evaluate.lookup_text import CODE_DIGITS, Lookup, compose
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

# A record has at least that many tokens: so many records are tried at most.
_RECORD_TOKENS = 6


def evaluate_lookup(
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
    """Measure whether a bundle finds the code of a name in a list of names and codes.

    Args:
        bundle: the bundle's folder.
        factors: lengths of the text in windows.
        depths: where the record is, 0 (the first) … 1 (the last).
        trials: texts for each length and depth.
        distractors: other codes of the same text the right one is ranked among, by likelihood;
            drawn at random where the text has fewer.
        seed: of names, codes and distractors.
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
    if as_integer("distractors", distractors, 1, InputError) >= 10**CODE_DIGITS:
        raise InputError(f"distractors={distractors}: there are {10**CODE_DIGITS} codes")
    return evaluate_task(
        "lookup", make_instance, bundle, factors=factors, depths=depths, trials=trials,
        distractors=distractors, seed=seed, provider=provider, threads=threads, kernels=kernels,
        progress=progress,
    )  # fmt: skip


def make_instance(
    model: LanguageModel, length: int, depth: float, distractors: int, dice: random.Random
) -> Instance:
    """Compose a text of at most ``length`` tokens (or of one record) and its candidates."""
    codec = model.codec
    task, prompt = _fit(codec, length, depth, str(dice.random()))
    wrong = dice.sample(task.others, min(distractors, len(task.others)))
    while len(wrong) < distractors:
        drawn = f"{dice.randrange(10**CODE_DIGITS):0{CODE_DIGITS}d}"
        if drawn not in (*wrong, task.code):
            wrong.append(drawn)
    candidates = [answer_ids(codec, task.prompt, f" {code}") for code in (task.code, *wrong)]
    end = task.prompt.find(task.record) + len(task.record)
    mentions = token_ranges(codec, task.prompt, f"{task.code}.", end - len(task.code) - 1)
    return placed(model.bundle.manifest.lambda_config, mentions[:1], prompt, candidates)


def _fit(codec: TextCodec, length: int, depth: float, seed: str) -> tuple[Lookup, list[int]]:
    """Find as many records as fit into ``length`` tokens."""

    def made(count: int) -> tuple[Lookup, list[int]]:
        task = compose(count, depth, seed)
        return task, codec.encode(task.prompt)

    return fitted(made, 1, max(1, min(length // _RECORD_TOKENS, 10**CODE_DIGITS)), length)
