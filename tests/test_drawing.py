"""Drawing tokens by the kernel library: the tokens that numpy draws, at a fraction of its time."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from lminf_export.errors import InputError
from lminf_export.runtime.drawing import Drawing, drawing_of
from lminf_export.runtime.kernels import AUTO, find_kernels
from lminf_export.runtime.sampling import Sampler, SamplingConfig
from tests.support.kernel_sets import SETS, instruction_set, needs_kernels

# Around blocks of 64, around where a vocabulary is no longer listed, and beyond.
SIZES = (1, 2, 5, 63, 64, 65, 1000, 8192, 8193, 20_011)
LARGE = 262_144


def library_drawing() -> Drawing:
    drawing = drawing_of(find_kernels(AUTO, "cpu"))
    assert drawing is not None, "the library is of an older build; pip install -e . builds it"
    return drawing


def logits_of(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    logits = (rng.normal(size=size) * rng.choice([0.1, 1, 3, 10])).astype(np.float32)
    if kind == "ties":
        return np.round(logits)
    if kind == "equal":
        return np.full(size, -2.5, np.float32)
    if kind == "masked":
        logits[rng.random(size) < 0.7] = -np.inf
        logits[rng.integers(size)] = 1
    if kind == "outliers":
        logits[rng.integers(size)] = 1e37
        logits[rng.integers(size)] = -1e37
    return logits


def random_config(rng: np.random.Generator) -> SamplingConfig:
    return SamplingConfig(
        temperature=float(rng.choice([1e-300, 0.1, 0.7, 1, 1.3, 90, 1e300])),
        top_k=int(rng.choice([0, 0, 1, 5, 40, 400, 5000, 9000])),
        top_p=float(rng.choice([1, 0.95, 0.5, 0.9, 1e-9, 0.999])),
        min_p=float(rng.choice([0, 0, 0.05, 0.5, 1])),
        repetition_penalty=float(rng.choice([1, 1, 1.2, 0.8])),
        seed=int(rng.integers(2**32)),
        presence_penalty=float(rng.choice([0, 0, 0.7, -2])),
        frequency_penalty=float(rng.choice([0, 0, 0.3, -1])),
        logit_bias={0: float(rng.choice([0, 5, -100]))} if rng.random() < 0.5 else None,
    )


@needs_kernels
@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "masked", "outliers"])
@pytest.mark.parametrize("name", SETS)
def test_the_library_draws_the_tokens_that_numpy_draws(name, kind):
    rng = np.random.default_rng(SETS.index(name))
    with instruction_set(name):
        for _ in range(60):
            size = int(rng.choice(SIZES))
            logits, config = logits_of(kind, size, rng), random_config(rng)
            before = logits.copy()
            plain = Sampler(config, size, 16)
            fast = Sampler(config, size, 16, library_drawing())
            for sampler in (plain, fast):
                sampler.observe(range(min(size, 9)))
            for _ in range(3):
                expected = plain.choose(logits)
                assert fast.choose(logits) == expected, (size, config)
                assert logits[expected] > -np.inf
                plain.observe((expected,))
                fast.observe((expected,))
            assert (logits == before).all()


@needs_kernels
@pytest.mark.parametrize("spread", [0.1, 1, 4])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(0.3, 0), (0.95, 0), (0.9999, 0), (0.9, 0.02), (0.3, 1e-4)]
)
def test_a_large_vocabulary_is_cut_where_numpy_cuts_it(spread, top_p, min_p):
    """The place of the cut is first guessed from a part of the vocabulary."""
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=LARGE) * spread).astype(np.float32)
    logits[: LARGE // 2].sort()  # no order may mislead the guess
    config = SamplingConfig(temperature=0.8, top_p=top_p, min_p=min_p, seed=3)
    plain, fast = Sampler(config, LARGE, 1), Sampler(config, LARGE, 1, library_drawing())
    for _ in range(4):
        assert fast.choose(logits) == plain.choose(logits)


@needs_kernels
def test_a_guess_that_misleads_is_mended():
    """Weights in places that the guess does not look at, or looks at only."""
    for step in range(1, 8):
        logits = np.full(20_000, -8, np.float32)
        logits[::step] = 0
        logits[np.random.default_rng(step).integers(0, 20_000, 200)] = 3
        config = SamplingConfig(temperature=1, top_p=0.7, min_p=0.01, seed=step)
        plain, fast = Sampler(config, 20_000, 1), Sampler(config, 20_000, 1, library_drawing())
        assert [fast.choose(logits) for _ in range(9)] == [plain.choose(logits) for _ in range(9)]


@needs_kernels
def test_draws_follow_the_distribution():
    logits = np.full(10_000, -np.inf, np.float32)
    places = np.array([3, 64, 5000, 9999])
    logits[places] = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(SamplingConfig(temperature=1, seed=5), 10_000, 8, library_drawing())
    drawn = np.array([sampler.choose(logits) for _ in range(20_000)])
    counts = (drawn[:, None] == places).mean(0)
    # Five standard deviations of a binomial of 20,000.
    assert np.abs(counts - [0.5, 0.25, 0.125, 0.125]).max() < 5 * 0.5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1}, {"temperature": 1, "top_k": 3}, {"temperature": 1, "top_p": 0.5}],
    ids=["greedy", "all", "top_k", "top_p"],
)
@pytest.mark.parametrize("wrong", ["nan", "nothing"])
@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_kernels)])
def test_logits_that_are_no_numbers_are_refused(fast, wrong, settings):
    drawing = library_drawing() if fast else None
    for size in (10, 10_000):
        logits = np.zeros(size, np.float32)
        logits[size // 2] = np.nan
        if wrong == "nothing":
            logits[:] = -np.inf
        with pytest.raises(InputError, match="no token can be chosen"):
            Sampler(SamplingConfig(**settings), size, 1, drawing).choose(logits)


@needs_kernels
def test_logits_in_another_form_are_drawn_all_the_same():
    rows = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    config = SamplingConfig(temperature=1, seed=0)
    sampler = Sampler(config, 500, 1, library_drawing())
    found = [sampler.choose(rows[:, 1]), sampler.choose(rows[:, 1].astype(np.float64))]
    plain = Sampler(config, 500, 1)
    assert found == [plain.choose(rows[:, 1].copy()) for _ in range(2)]


def test_logits_that_cannot_be_written_are_penalised_in_a_copy():
    logits = np.array([3, 2, 1], np.float32)
    sampler = Sampler(SamplingConfig(repetition_penalty=10), 3, 2)
    sampler.observe([0])
    assert sampler.choose(logits) == 1
    logits.flags.writeable = False
    assert sampler.choose(logits) == 1
    assert logits.tolist() == [3, 2, 1]


@needs_kernels
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"repetition_penalty": 1.1}, 40),
        ({"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}, 60),
        ({"temperature": 0.8}, 150),
        ({"temperature": 0.8, "top_p": 0.95, "min_p": 0.02}, 300),
    ],
    ids=["greedy", "top_k", "all", "top_p"],
)
def test_a_draw_takes_a_few_times_as_long_as_an_argmax(settings, most):
    """numpy alone takes 200 to 7,000 times as long."""
    logits = np.random.default_rng(0).normal(size=LARGE).astype(np.float32) * 2
    sampler = Sampler(SamplingConfig(**settings, seed=0), LARGE, 1024, library_drawing())
    sampler.observe(range(1024))

    def best(call):
        times = []
        for _ in range(15):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(lambda: sampler.choose(logits)) < most * best(logits.argmax)
