"""Questions about a text that is read once: what the tasks of passkeys and of lookups share.

What a bounded cache holds decides the answer: the window, the sink tokens, and nothing in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lminf_export.bundle.records import LambdaSettings
from lminf_export.errors import InputError
from lminf_export.evaluate.text import special_prefix
from lminf_export.operator.settings import as_integer
from lminf_export.progress import Progress
from lminf_export.runtime.cache import State
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.options import Provider
from lminf_export.runtime.text import TextCodec
from lminf_export.verify.likelihood import negative_log_likelihood

FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
DEPTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
TRIALS = 20
DISTRACTORS = 9
# Texts read side by side.
BATCH_SIZE = 8
_NORMAL_95 = 1.959964

Made = TypeVar("Made")


@dataclass(frozen=True)
class Instance:
    """One question: its ids, the candidates' ids (the right one first), and where the key is.

    Attributes:
        prompt: (P,) ids, start tokens included.
        candidates: ids of the right answer and of the distractors.
        place: "window", "sinks" or "evicted": where the key's nearest mention is in the cache
            when the question is answered.
        distance: tokens from that mention to the end of the answer.
    """

    prompt: list[int]
    candidates: list[list[int]]
    place: str
    distance: int


class Task(Protocol):
    """Makes one instance of a task."""

    def __call__(
        self, model: LanguageModel, length: int, depth: float, distractors: int, dice: random.Random
    ) -> Instance:
        """Compose a text of at most ``length`` tokens with what is asked for at a depth."""
        ...


def evaluate_task(
    name: str,
    make: Task,
    bundle: str | Path,
    *,
    factors: Sequence[float],
    depths: Sequence[float],
    trials: int,
    distractors: int,
    seed: int,
    provider: Provider,
    threads: int | None,
    kernels: str | Path,
    progress: Progress,
) -> dict[str, Any]:
    """Ask a bundle the questions of a task, by length of the text and depth: see the tasks."""
    _check(factors, depths, trials, distractors)
    model = load(bundle, provider=provider, threads=threads, kernels=kernels)
    manifest = model.bundle.manifest
    window = manifest.lambda_config.window_size
    cells = []
    total = sum(factors) * len(depths)
    done = 0.0
    for factor in factors:
        for depth in depths:
            progress(name, done / total)
            dice = random.Random(f"{seed}/{factor}/{depth}")
            made = [
                make(model, round(factor * window), depth, distractors, dice) for _ in range(trials)
            ]
            answers = [x for i in range(0, trials, BATCH_SIZE)
                       for x in ask(model, made[i : i + BATCH_SIZE])]  # fmt: skip
            cells.append(_cell(factor, depth, made, answers))
            done += factor
    return {
        "evaluation": name,
        **describe_bundle(manifest),
        "attention": model.session.attention,
        "trials": trials,
        "candidates": distractors + 1,
        "chance_of_rank_one": 1 / (distractors + 1),
        "seed": seed,
        "cells": cells,
        **environment(),
    }


def fitted(
    make: Callable[[int], tuple[Made, list[int]]], low: int, high: int, length: int
) -> tuple[Made, list[int]]:
    """Make the longest text that fits.

    Args:
        make: returns the text of a number of parts, and its ids; the more parts the more ids.
        low: parts of the shortest text, which is taken even if it is too long.
        high: parts that are tried at most.
        length: ids that fit.
    """
    while low < high:
        middle = (low + high + 1) // 2
        if len(make(middle)[1]) <= length:
            low = middle
        else:
            high = middle - 1
    return make(low)


def placed(
    settings: LambdaSettings,
    mentions: Sequence[tuple[int, int]],
    prompt: list[int],
    candidates: list[list[int]],
) -> Instance:
    """Return the instance of a prompt that mentions the answer at token ranges [begin, end)."""
    last = len(prompt) + len(candidates[0]) - 1
    place = "evicted"
    if any(begin > last - settings.window_size for begin, _ in mentions):
        place = "window"
    elif any(end <= settings.num_sink_tokens for _, end in mentions):
        place = "sinks"
    nearest = max((begin for begin, _ in mentions), default=0)
    return Instance(prompt, candidates, place, last - nearest)


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
        "distance": round(float(np.mean([instance.distance for instance in made])), 1),
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
    as_integer("distractors", distractors, 1, InputError)


def answer_ids(codec: TextCodec, prompt: str, answer: str) -> list[int]:
    """Return the ids an answer adds to its prompt."""
    # The prompt's last words are enough: no tokenizer looks further back across spaces.
    tail = prompt[-64:]
    before = codec.encode(tail, add_special_tokens=False)
    after = codec.encode(tail + answer, add_special_tokens=False)
    common = 0
    while common < len(before) and before[common] == after[common]:
        common += 1
    return after[common:]


def token_ranges(codec: TextCodec, text: str, part: str, first: int = 0) -> list[tuple[int, int]]:
    """Return where a part stands in a text, as ranges [begin, end) of the text's tokens.

    Args:
        codec: the tokenizer; tokens that it puts first count.
        text: all of it.
        part: what is looked for.
        first: character from which it is looked for.
    """
    encoding = codec.tokenizer.encode(text, add_special_tokens=False)
    shift = len(special_prefix(codec))
    found = []
    start = text.find(part, first)
    while start >= 0:
        end = start + len(part)
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
        if inside:
            found.append((inside[0] + shift, inside[-1] + 1 + shift))
        start = text.find(part, end)
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
