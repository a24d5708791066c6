"""Sampling in an engine: every setting draws what it draws alone, whoever shares the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lminf_export.errors import ConfigError, InputError
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.load import load
from lminf_export.runtime.sampling import SamplingConfig, logprobs_of
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(head_dim=8, logits_scale=0.25)  # see test_engine
V = TINY.vocab_size
LENGTH = 24


@pytest.fixture(scope="module", params=["auto", "none"], ids=["kernels", "body"])
def lm(request, tmp_path_factory):
    path = TINY.write(tmp_path_factory.mktemp("lm") / "bundle").path
    return load(path, threads=1, kernels=request.param)


def settings_of(rng):
    """Settings of any kind, each often left out."""

    def some(name, *values):
        return {name: values[int(rng.integers(len(values)))]} if rng.random() < 0.5 else {}

    return {
        **some("temperature", 0.0, 0.7, 1.5),
        **some("top_k", 5, 50),
        **some("top_p", 0.5, 0.9),
        **some("min_p", 0.05),
        **some("repetition_penalty", 1.3, 0.8),
        **some("presence_penalty", 1.0, -1.0),
        **some("frequency_penalty", 0.6, -0.2),
        **some("logit_bias", {3: 4.0, 9: -100.0}, {256: 100.0}),
        "seed": int(rng.integers(1000)),
    }


def alone(lm, ids, settings, count=LENGTH):
    return list(lm.generate(ids, max_new_tokens=count, **settings))


@pytest.mark.parametrize("seed", range(3))
def test_settings_of_every_kind_draw_what_they_draw_alone(lm, seed):
    rng = np.random.default_rng(seed)
    asked = [(rng.integers(0, V, rng.integers(1, 30)).tolist(), settings_of(rng)) for _ in range(9)]
    with Engine(lm, slots=3, quantum=5) as engine:
        streams = [
            engine.submit(
                Request(ids, LENGTH, SamplingConfig(**settings), num_logprobs=seed or None)
            )
            for ids, settings in asked
        ]
        found = [list(stream) for stream in streams]
    for tokens, (ids, settings) in zip(found, asked, strict=True):
        assert [token.id for token in tokens] == alone(lm, ids, settings), settings


def test_continuations_draw_with_seeds_of_their_own_and_count_what_they_wrote(lm):
    settings = {"temperature": 1.2, "frequency_penalty": 1.5, "presence_penalty": 0.5}
    ids = [5, 6, 7, 5, 5]
    request = Request(ids, LENGTH, SamplingConfig(**settings, seed=40))
    with Engine(lm, slots=2, quantum=4) as engine:
        streams = engine.submit_many(request, 5)
        found = [[token.id for token in stream] for stream in streams]
    assert found == [alone(lm, ids, {**settings, "seed": 40 + i}) for i in range(5)]
    assert len({tuple(tokens) for tokens in found}) == 5


def test_continuations_without_a_seed_differ(lm):
    request = Request([5], LENGTH, SamplingConfig(temperature=2.0))
    with Engine(lm, slots=2) as engine:
        found = {tuple(token.id for token in s) for s in engine.submit_many(request, 4)}
    assert len(found) == 4


def test_log_probabilities_are_those_of_the_own_logits_before_every_edit(lm):
    settings = {"temperature": 0.9, "presence_penalty": 2.0, "logit_bias": {8: 30.0}, "seed": 2}
    ids = [1, 2, 3]
    with Engine(lm, slots=3) as engine:
        others = [engine.submit(Request([number], 60)) for number in range(2)]
        stream = engine.submit(Request(ids, 9, SamplingConfig(**settings), num_logprobs=5))
        tokens = list(stream)
        for other in others:
            other.cancel()
    chosen = [token.id for token in tokens]
    logits = lm.forward([ids + chosen], lm.new_state())[0]
    for place, token in enumerate(tokens):
        value, top = logprobs_of(logits[len(ids) + place - 1], token.id, 5)
        assert abs(token.logprob - value) < 1e-4
        assert [t for t, _ in token.top] == [t for t, _ in top]


def test_a_bias_decides_alone_and_forbids(lm):
    forced = SamplingConfig(logit_bias={77: 100.0})
    free = alone(lm, [4], {})
    forbidden = SamplingConfig(logit_bias=dict.fromkeys(free, -100.0))
    with Engine(lm, slots=2) as engine:
        one, two = (engine.submit(Request([4], 8, config)) for config in (forced, forbidden))
        assert [token.id for token in one] == [77] * 8
        assert not {token.id for token in two} & set(free)


def test_what_a_vocabulary_or_a_seed_cannot_hold_is_refused_when_it_comes(lm):
    with Engine(lm, slots=2) as engine:
        with pytest.raises(ConfigError, match="vocabulary"):
            engine.submit(Request([1], 3, SamplingConfig(logit_bias={V: 1.0})))
        last = SamplingConfig(temperature=1, seed=2**128 - 1)
        assert len(list(engine.submit(Request([1], 3, last)))) == 3
        with pytest.raises(ConfigError, match="seed"):
            engine.submit_many(Request([1], 3, last), 2)
        assert engine.stats().waiting == engine.stats().active == 0


def test_a_function_that_fails_ends_its_request_and_no_other(lm):
    def ends_at(token):
        raise ZeroDivisionError("of the caller")

    with Engine(lm, slots=3) as engine:
        other = engine.submit(Request([4], 40))
        streams = [
            engine.submit(Request([1], 9, config, ends_at=ends_at))
            for config in (SamplingConfig(), SamplingConfig(temperature=1, seed=0))
        ]
        for stream in streams:
            with pytest.raises(InputError, match="ends_at has failed: ZeroDivisionError"):
                list(stream)
        assert [token.id for token in other] == alone(lm, [4], {}, 40)
        assert engine.stats().healthy


def test_a_deadline_beyond_what_a_clock_can_wait_ends_nothing(lm):
    with Engine(lm, slots=2) as engine:
        request = Request([4], 6, deadline=1e300)
        assert len(list(engine.submit(request))) == 6
        held = engine.submit(dataclasses.replace(request, max_new_tokens=None))
        assert engine.drain(0.05) is False
        assert engine.stats().healthy
        held.cancel()
        assert engine.drain(1e300)
