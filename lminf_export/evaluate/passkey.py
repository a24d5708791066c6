"""The passkey task on a bundle: whether a key is retrieved, by text length and depth of the key.

Source: arXiv 2308.16137, section 4.3. What a bounded cache holds decides the answer: the window,
the sink tokens, and nothing in between.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import InputError
from lminf_export.evaluate.passkey_text import Passkey, compose
from lminf_export.evaluate.text import special_prefix
from lminf_export.operator.settings import as_integer
from lminf_export.progress import Progress, silent
from lminf_export.runtime.cache import State
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.options import Provider
from lminf_export.runtime.text import TextCodec
from lminf_export.verify.likelihood import negative_log_likelihood

FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
DEPTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
TRIALS = 20
DISTRACTORS = 9
KEY_DIGITS = 5
# Texts read side by side.
BATCH_SIZE = 8
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Instance:
    """One question: its ids, the candidates' ids (the right one first), and where the key is.

    Attributes:
        prompt: (P,) ids, start tokens included.
        candidates: ids of the right answer and of the distractors.
        place: "window", "sinks" or "evicted": where the key's nearest mention is in the cache
            when the question is answered.
    """

    prompt: list[int]
    candidates: list[list[int]]
    place: str


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
    _check(factors, depths, trials, distractors)
    model = load(bundle, provider=provider, threads=threads, kernels=kernels)
    manifest = model.bundle.manifest
    window = manifest.lambda_config.window_size
    cells = []
    total = sum(factors) * len(depths)
    done = 0.0
    for factor in factors:
        for depth in depths:
            progress("passkey", done / total)
            dice = random.Random(f"{seed}/{factor}/{depth}")
            made = [
                make_instance(model, round(factor * window), depth, distractors, dice)
                for _ in range(trials)
            ]
            answers = [x for i in range(0, trials, BATCH_SIZE)
                       for x in ask(model, made[i : i + BATCH_SIZE])]  # fmt: skip
            cells.append(_cell(factor, depth, made, answers))
            done += factor
    return {
        "evaluation": "passkey",
        **describe_bundle(manifest),
        "attention": model.session.attention,
        "trials": trials,
        "candidates": distractors + 1,
        "chance_of_rank_one": 1 / (distractors + 1),
        "seed": seed,
        "cells": cells,
        **environment(),
    }


def make_instance(
    model: LanguageModel, length: int, depth: float, distractors: int, dice: random.Random
) -> Instance:
    """Compose a text of at most ``length`` tokens (or the shortest there is) and its candidates."""
    codec = model.codec
    keys = _distinct_keys(distractors + 1, dice)
    task, prompt = _fit(codec, keys[0], length, depth)
    candidates = [_answer_ids(codec, task.prompt, f" {key}") for key in keys]
    settings = model.bundle.manifest.lambda_config
    last = len(prompt) + len(candidates[0]) - 1
    mentions = _mentions(codec, task, prompt)
    place = "evicted"
    if any(begin > last - settings.window_size for begin, _ in mentions):
        place = "window"
    elif any(end <= settings.num_sink_tokens for _, end in mentions):
        place = "sinks"
    return Instance(prompt, candidates, place)


def ask(model: LanguageModel, instances: Sequence[Instance]) -> list[tuple[bool, int]]:
    """Answer questions side by side; for each, whether greedily exact, and the key's rank."""
    rows, width = len(instances), len(instances[0].candidates)
    prompts = [instance.prompt for instance in instances]
    ids, lengths = _padded([prompt[:-1] for prompt in prompts])
    state = model.new_state(rows)
    model.forward(ids, state, lengths=lengths, logits="none")
    forked = _fork(model, state, width)
    # The last token of the prompt predicts the first of the answer.
    tails = [
        [prompt[-1], *candidate]
        for prompt, instance in zip(prompts, instances, strict=True)
        for candidate in instance.candidates
    ]
    tail_ids, tail_lengths = _padded(tails)
    logits = model.forward(tail_ids, forked, lengths=tail_lengths)
    assert logits is not None
    answers = []
    for row in range(rows):
        losses = []
        exact = False
        for column in range(width):
            index = row * width + column
            target = np.array(tails[index][1:], np.int64)
            found = logits[index, : len(target)]
            losses.append(float(negative_log_likelihood(found, target).sum()))
            if column == 0:
                exact = bool((found.argmax(-1) == target).all())
        answers.append((exact, 1 + sum(loss < losses[0] for loss in losses[1:])))
    return answers


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    share, z = successes / trials, _NORMAL_95
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (
        share * (1 - share) / trials + z * z / (4 * trials * trials)
    ) ** 0.5  # fmt: skip
    return max(0.0, centre - half), min(1.0, centre + half)


def _cell(
    factor: float, depth: float, made: list[Instance], answers: list[tuple[bool, int]]
) -> dict[str, Any]:
    exact = sum(found for found, _ in answers)
    first = sum(rank == 1 for _, rank in answers)
    places = [instance.place for instance in made]
    return {
        "windows": factor,
        "depth": depth,
        "tokens": round(float(np.mean([len(instance.prompt) for instance in made])), 1),
        "key_is_in": {place: places.count(place) for place in sorted(set(places))},
        "exact": exact / len(answers),
        "exact_95": list(wilson(exact, len(answers))),
        "rank_one": first / len(answers),
        "rank_one_95": list(wilson(first, len(answers))),
        "mean_rank": float(np.mean([rank for _, rank in answers])),
    }


def _check(
    factors: Sequence[float], depths: Sequence[float], trials: int, distractors: int
) -> None:
    if not factors or any(not 0 < factor < float("inf") for factor in factors):
        raise InputError(f"lengths {list(factors)}: must be numbers of windows above 0")
    if not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise InputError(f"depths {list(depths)}: must lie between 0 and 1")
    as_integer("trials", trials, 1, InputError)
    if as_integer("distractors", distractors, 1, InputError) >= 10**KEY_DIGITS:
        raise InputError(f"distractors={distractors}: there are {10**KEY_DIGITS} keys")


def _distinct_keys(count: int, dice: random.Random) -> list[str]:
    return [f"{key:0{KEY_DIGITS}d}" for key in dice.sample(range(10**KEY_DIGITS), count)]


def _fit(codec: TextCodec, key: str, length: int, depth: float) -> tuple[Passkey, list[int]]:
    """Find as many filler sentences as fit into ``length`` tokens, and split them at the depth."""
    low, high = 0, max(1, length)  # a sentence has more than one token

    def made(count: int) -> tuple[Passkey, list[int]]:
        before = round(depth * count)
        task = compose(key, before, count - before)
        return task, codec.encode(task.prompt)

    while low < high:
        middle = (low + high + 1) // 2
        if len(made(middle)[1]) <= length:
            low = middle
        else:
            high = middle - 1
    return made(low)


def _answer_ids(codec: TextCodec, prompt: str, answer: str) -> list[int]:
    """Return the ids an answer adds to its prompt."""
    # The prompt's last words are enough: no tokenizer looks further back across spaces.
    tail = prompt[-64:]
    before = codec.encode(tail, add_special_tokens=False)
    after = codec.encode(tail + answer, add_special_tokens=False)
    common = 0
    while common < len(before) and before[common] == after[common]:
        common += 1
    return after[common:]


def _mentions(codec: TextCodec, task: Passkey, prompt: list[int]) -> list[tuple[int, int]]:
    """Return where the key stands in the prompt, as token ranges [begin, end)."""
    encoding = codec.tokenizer.encode(task.prompt, add_special_tokens=False)
    shift = len(special_prefix(codec))
    found = []
    start = task.prompt.find(task.key)
    while start >= 0:
        end = start + len(task.key)
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
        if inside:
            found.append((inside[0] + shift, inside[-1] + 1 + shift))
        start = task.prompt.find(task.key, end)
    return found


def _padded(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids, lengths


def _fork(model: LanguageModel, state: State, copies: int) -> State:
    """Return a state in which every stream stands ``copies`` times, side by side."""
    fork = model.new_state(state.batch_size * copies)
    rows = np.repeat(np.arange(state.batch_size), copies)
    model.session.restore(fork, model.session.snapshot(state).rows(rows))
    return fork
