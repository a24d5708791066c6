"""Generation: what is yielded is what the logits say, and a stream can be taken up again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lminf_export.errors import ConfigError, InputError
from lminf_export.runtime.load import load
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel()


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(TINY.write(tmp_path_factory.mktemp("b") / "tiny").path, threads=1)


def greedy(ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(TINY.reference_logits(np.array(ids))[-1].argmax()))
    return ids[-count:]


def test_greedy_text_is_the_argmax_of_every_step_past_the_window(lm):
    prompt = [3, 1, 4, 1, 5]
    assert list(lm.generate(prompt, max_new_tokens=40)) == greedy(prompt, 40)
    assert list(lm.generate(np.array(prompt), max_new_tokens=3)) == greedy(prompt, 3)


def test_ids_come_one_by_one_and_for_ever(lm):
    ids = lm.generate([1], max_new_tokens=None, stop_token_ids=())
    assert len(list(itertools.islice(ids, 500))) == 500


def test_a_stream_goes_on_where_it_stopped(lm):
    whole = list(lm.generate([3, 1, 4], max_new_tokens=30))
    state = lm.new_state()
    first = list(lm.generate([3, 1, 4], max_new_tokens=11, state=state))
    # The last id has been yielded but not read.
    assert state.past_length == 3 + 11 - 1
    rest = list(lm.generate(first[-1:], max_new_tokens=19, state=state))
    assert first + rest == whole


def test_stop_tokens_end_the_text_and_are_not_yielded(lm, tmp_path):
    text = list(lm.generate([3, 1, 4], max_new_tokens=20))
    stop = text[5]
    expected = text[: text.index(stop)]
    assert list(lm.generate([3, 1, 4], max_new_tokens=20, stop_token_ids=[stop])) == expected
    ending = load(TinyModel(eos_token_ids=(7, stop)).write(tmp_path / "eos").path, threads=1)
    assert list(ending.generate([3, 1, 4], max_new_tokens=20)) == expected
    assert list(ending.generate([3, 1, 4], max_new_tokens=20, stop_token_ids=())) == text


def test_no_tokens_asked_for_reads_nothing(lm):
    state = lm.new_state()
    assert list(lm.generate([1], max_new_tokens=0, state=state)) == []
    assert state.past_length == 0


def test_a_seed_repeats_the_draw_and_another_does_not(lm):
    def draw(seed):
        settings = {"temperature": 30.0, "top_p": 0.95, "seed": seed}
        return list(lm.generate([1, 2], max_new_tokens=30, **settings))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_top_k_of_one_is_greedy(lm):
    expected = list(lm.generate([1, 2], max_new_tokens=9))
    assert list(lm.generate([1, 2], max_new_tokens=9, temperature=2.0, top_k=1)) == expected


def test_the_repetition_penalty_forgets_what_left_the_window(lm):
    """A penalty so large that no token comes twice, within a window that never holds them all."""
    ids = list(lm.generate([1], max_new_tokens=60, repetition_penalty=1e9))
    window = TINY.window_size
    for start in range(len(ids) - window):
        recent = ids[start : start + window]
        assert len(set(recent)) == window


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([257], "token id 257"),
        ([1.5], "type float64"),
    ],
)
def test_a_wrong_prompt_is_refused_at_the_call(lm, prompt, message):
    with pytest.raises(InputError, match=message):
        lm.generate(prompt)


def test_wrong_settings_are_refused_at_the_call(lm):
    with pytest.raises(ConfigError, match="temperature=-1"):
        lm.generate([1], temperature=-1)
    for count in (-1, 1.5, True):
        with pytest.raises(InputError, match="max_new_tokens="):
            lm.generate([1], max_new_tokens=count)
    with pytest.raises(InputError, match="this state has 2"):
        lm.generate([1], state=lm.new_state(2))
    with pytest.raises(InputError, match="not from this model"):
        lm.generate([1], state="state")
