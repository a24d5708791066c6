"""Sampling: transformers' filters in its order, and draws that follow the distribution."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

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

from lminf_export.errors import ConfigError, InputError
from lminf_export.runtime.penalties import CountedTokens, edited, repetition_penalty
from lminf_export.runtime.sampling import Sampler, SamplingConfig, distribution, logprobs_of

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
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_the_distribution_is_that_of_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    config = SamplingConfig(temperature, top_k, top_p, min_p, penalty)
    logits = random_logits(seed)
    seen = np.random.default_rng(seed).integers(0, VOCAB, 17)
    edits = [(np.unique(seen), repetition_penalty(penalty))]
    with edited(logits.astype(np.float64), edits) as changed:
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
    logits = np.array([4.0, -4.0, 4.0])
    with edited(logits, [(np.array([0, 1]), repetition_penalty(2.0))]) as changed:
        assert changed.tolist() == [2.0, -8.0, 4.0]
    assert logits.tolist() == [4.0, -4.0, 4.0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf]),
        ("top_k", [-1, 1.5, True]),
        ("top_p", [0, -1, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, 1e-38, 1e-300, 1e300, 10**400, math.inf, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan, True, "1"]),
        ("frequency_penalty", [-2.1, 2.1, math.inf, None]),
        ("logit_bias", [3, "3", [1], {"a": 1}, {-1: 1}, {True: 1}, ((1, 2, 3),)]),
        ("seed", [-1, 1.5, True, 2**128]),
    ],
)
def test_settings_outside_their_rule_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=name):
            SamplingConfig(**{name: value})


@pytest.mark.parametrize("bias", [100.5, -101, math.nan, math.inf, None, True, "1", 10**400])
def test_a_bias_outside_its_rule_is_refused_with_its_token(bias):
    with pytest.raises(ConfigError, match="logit_bias of token 7="):
        SamplingConfig(logit_bias={7: bias})


def test_a_bias_of_a_token_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="token 4: the vocabulary is 0 … 3"):
        Sampler(SamplingConfig(logit_bias={4: 1}), 4, 8)


def test_settings_are_hashable_and_can_be_replaced():
    config = SamplingConfig(logit_bias={5: 1, np.int64(2): np.float32(-0.5)}, temperature=1)
    assert config.logit_bias == ((2, -0.5), (5, 1.0))
    assert dataclasses.replace(config, seed=3).biases == config.biases
    assert len({config, SamplingConfig(temperature=np.float64(1), logit_bias={2: -0.5, 5: 1})}) == 1


def test_plain_greedy_is_what_nothing_edits():
    assert SamplingConfig(top_k=3, seed=4).is_plain_greedy
    edits = {
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {0: 1},
    }
    for name, value in {"temperature": 1, **edits}.items():
        assert not SamplingConfig(**{name: value}).is_plain_greedy


def edited_by_hand(logits, config, prompt, answer):
    """Logits (V,) after OpenAI's and transformers' formulas, over all tokens."""
    changed = logits.astype(np.float64)
    seen = np.unique([*prompt, *answer])
    rate = config.repetition_penalty
    changed[seen] = np.where(changed[seen] < 0, changed[seen] * rate, changed[seen] / rate)
    counts = np.bincount(np.array(answer, np.int64), minlength=len(logits))
    changed -= config.frequency_penalty * counts + config.presence_penalty * (counts > 0)
    for token, amount in config.biases:
        changed[token] += amount
    return changed


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    biases=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5),
    read_only=st.booleans(),
)
def test_greedy_follows_the_formulas(seed, repetition, presence, frequency, biases, read_only):
    config = SamplingConfig(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=biases,
    )
    rng = np.random.default_rng(seed)
    prompt, answer = rng.integers(0, VOCAB, 9).tolist(), []
    sampler = Sampler(config, VOCAB, 64)
    sampler.observe(prompt)
    for _ in range(12):
        logits = rng.normal(size=VOCAB).astype(np.float32)
        logits.flags.writeable = not read_only
        before = logits.copy()
        token = sampler.choose(logits)
        assert (logits == before).all()
        expected = edited_by_hand(logits, config, prompt, answer)
        assert expected[token] >= expected.max() - 1e-4
        sampler.observe((token,))
        answer.append(token)


def test_only_written_tokens_count():
    config = SamplingConfig(presence_penalty=2)
    logits = np.array([3, 2, 0], np.float32)
    sampler = Sampler(config, 3, 8)
    sampler.observe([0, 0, 1])
    assert sampler.choose(logits) == 0
    # What is read in place of the chosen token is not written, and neither is what follows.
    sampler.observe([1, 0])
    assert sampler.choose(logits) == 0
    sampler.observe((0, 1, 1))
    assert sampler.choose(logits) == 1


def test_counts_reach_as_far_as_the_memory():
    counted = CountedTokens(5, 7)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, 400).tolist()
    for end in range(1, 401):
        counted.add(tokens[end - 1 : end])
        found = dict(zip(counted.ids.tolist(), counted.counts.tolist(), strict=True))
        assert found == dict(Counter(tokens[max(end - 5, 0) : end]))


def test_an_edit_of_huge_logits_stays_finite_and_excluded_tokens_stay_excluded():
    logits = np.array([3e38, -3e38, -np.inf, 1], np.float32)
    sampler = Sampler(SamplingConfig(repetition_penalty=1e-9, logit_bias={2: 100}), 4, 8)
    sampler.observe([0, 1, 2])
    assert sampler.choose(logits) == 0
    assert logits.tolist() == [np.float32(3e38), np.float32(-3e38), -np.inf, 1]


@pytest.mark.parametrize("size", [1, 5, 4096, 4097, 50_000, 262_144])
@pytest.mark.parametrize("kind", ["spread", "ties", "equal"])
def test_log_probabilities_are_those_of_a_softmax(size, kind):
    logits = random_logits(size, size)
    if kind == "ties":
        logits = np.round(logits / 3)
    if kind == "equal":
        logits[:] = -1e30
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    order = np.argsort(-exact, kind="stable")
    for count in (0, 1, 20, 600):
        value, top = logprobs_of(logits, size // 2, count)
        assert abs(value - exact[size // 2]) < 1e-9
        assert [token for token, _ in top] == order[:count].tolist()
        assert np.abs(np.array([x for _, x in top]) - exact[order[:count]]).max(initial=0) < 1e-9


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_there_are_no_log_probabilities_of_what_is_not_finite(wrong):
    logits = random_logits(1)
    logits[3] = wrong
    with pytest.raises(InputError, match="not finite"):
        logprobs_of(logits, 0, 2)


def test_log_probabilities_of_huge_logits_are_finite():
    value, top = logprobs_of(np.array([3e38, 3e38, -3e38, 3e38], np.float32), 1, 9)
    assert value == top[0][1] == -math.log(3)
    assert [token for token, _ in top] == [0, 1, 3, 2]
