"""Sampling: transformers' filters in its order, and draws that follow the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lminf_export.errors import ConfigError
from lminf_export.runtime.sampling import Sampler, SamplingConfig, distribution, penalised

VOCAB = 101


def random_logits(seed, size=VOCAB):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32) * 4


def in_transformers(logits, config, seen):
    """Probabilities (V,) by transformers' processors in the order its generate() uses."""
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    ids = torch.tensor([seen], dtype=torch.int64)
    chain = [TemperatureLogitsWarper(config.temperature)]
    if config.top_k:
        chain.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        chain.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        chain.append(MinPLogitsWarper(config.min_p))
    if config.repetition_penalty != 1:
        chain.insert(0, RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    for step in chain:
        scores = step(ids, scores)
    return scores.softmax(-1)[0].numpy()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, VOCAB + 9),
    top_p=st.floats(0.05, 1),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_the_distribution_is_that_of_transformers(
    seed, temperature, top_k, top_p, min_p, repetition_penalty
):
    config = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    logits = random_logits(seed)
    seen = np.random.default_rng(seed).integers(0, VOCAB, 17)
    changed = penalised(logits.astype(np.float64), np.unique(seen), repetition_penalty)
    token_ids, probabilities = distribution(changed, config)
    found = np.zeros(VOCAB)
    found[token_ids] = probabilities
    expected = in_transformers(logits, config, seen.tolist())
    # transformers cuts on a sum from below, we from above: a tie with p may fall either way.
    assert np.abs(found - expected).max() < 1e-9
    assert math.isclose(probabilities.sum(), 1)


@pytest.mark.parametrize("temperature", [0.3, 90.0], ids=["few_tokens_reach_p", "most_are_needed"])
def test_a_large_vocabulary_is_cut_as_in_transformers(temperature):
    logits = random_logits(7, size=5003)
    config = SamplingConfig(temperature, top_p=0.9)
    token_ids, probabilities = distribution(logits, config)
    found = np.zeros(len(logits))
    found[token_ids] = probabilities
    assert (len(token_ids) > 1024) == (temperature == 90.0)
    assert np.abs(found - in_transformers(logits, config, [])).max() < 1e-9


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(SamplingConfig(temperature=1, seed=5), 4, 8)
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=4)
    # Five standard deviations of a binomial of 20,000.
    assert np.abs(counts / 20_000 - [0.5, 0.25, 0.125, 0.125]).max() < 5 * 0.5 / math.sqrt(20_000)


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = np.array([1, 7, 7, -3], np.float32)
    assert Sampler(SamplingConfig(top_k=2, top_p=0.1), 4, 8).choose(logits) == 1


def test_tiny_temperatures_and_masked_logits_stay_finite():
    logits = np.array([5, 5.001, -np.inf, 1e4, 3], np.float32)
    for temperature in (1e-300, 1e-9, 1.0, 1e9):
        sampler = Sampler(SamplingConfig(temperature=temperature, seed=0), 5, 8)
        for _ in range(50):
            assert sampler.choose(logits) != 2


def test_filters_never_leave_nothing():
    logits = np.zeros(VOCAB, np.float32)
    config = SamplingConfig(temperature=1, top_k=1, top_p=1e-9, min_p=1.0)
    token_ids, probabilities = distribution(logits, config)
    # Ties with the k-th largest stay, as in transformers; top-p then keeps one.
    assert len(token_ids) == 1
    assert probabilities.tolist() == [1.0]


def test_logits_are_not_changed():
    logits = random_logits(3)
    before = logits.copy()
    sampler = Sampler(SamplingConfig(1, 9, 0.9, 0.01, 1.5, 3), VOCAB, 8)
    sampler.observe(range(VOCAB))
    sampler.choose(logits)
    assert (logits == before).all()


def test_a_penalty_reaches_as_far_as_the_memory():
    logits = np.array([3, 2, 1], np.float32)
    sampler = Sampler(SamplingConfig(repetition_penalty=10), 3, 2)
    sampler.observe([0])
    assert sampler.choose(logits) == 1
    sampler.observe([1, 1])
    assert sampler.choose(logits) == 0
    sampler.observe([0, 2, 2])
    assert sampler.choose(logits) == 0


def test_a_penalty_makes_negative_logits_more_negative():
    changed = penalised(np.array([4.0, -4.0, 4.0]), np.array([0, 1]), 2.0)
    assert changed.tolist() == [2.0, -8.0, 4.0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf]),
        ("top_k", [-1, 1.5, True]),
        ("top_p", [0, -1, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, math.inf, math.nan]),
        ("seed", [-1, 1.5, True]),
    ],
)
def test_settings_outside_their_rule_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"{name}="):
            SamplingConfig(**{name: value})
