"""`generate_batch`: prompts of different lengths side by side get what each gets alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lminf_export.errors import InputError, SessionError
from lminf_export.runtime.load import load
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(head_dim=8, logits_scale=0.25)  # see test_engine
PROMPTS = ["a", "In the beginning", "x" * 40, "Bäume"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load(
        TINY.write(tmp_path_factory.mktemp("lm") / "bundle").path, threads=1, kernels="none"
    )


def alone(lm, text, count, **settings):
    ids = lm.codec.encode(text)
    return list(lm.generate(ids, max_new_tokens=count, **settings))


def test_prompts_of_different_lengths_get_what_each_gets_alone(lm):
    found = lm.generate_batch(PROMPTS, max_new_tokens=20, slots=3)
    assert [g.token_ids for g in found] == [alone(lm, text, 20) for text in PROMPTS]
    assert [g.prompt for g in found] == [0, 1, 2, 3]
    assert [g.num_prompt_tokens for g in found] == [len(lm.codec.encode(x)) for x in PROMPTS]
    for text, one in zip(PROMPTS, found, strict=True):
        ids = lm.codec.encode(text)
        assert one.text == "".join(lm.codec.stream(one.token_ids, after=ids))
        assert one.finish_reason == "length"


def test_token_ids_and_several_continuations_with_seeds(lm):
    prompts = [[1, 2, 3], [4]]
    found = lm.generate_batch(prompts, n=3, max_new_tokens=8, temperature=0.5, seed=9)
    assert [(g.prompt, g.index) for g in found] == [(p, i) for p in range(2) for i in range(3)]
    for one in found:
        ids = prompts[one.prompt]
        wanted = list(lm.generate(ids, max_new_tokens=8, temperature=0.5, seed=9 + one.index))
        assert one.token_ids == wanted


def test_pieces_come_as_they_are_chosen_and_make_up_the_whole(lm):
    whole = lm.generate_batch(PROMPTS, n=2, max_new_tokens=15, num_logprobs=2)
    tokens, texts, reasons = {}, {}, {}
    for piece in lm.generate_batch(PROMPTS, n=2, max_new_tokens=15, num_logprobs=2, stream=True):
        key = piece.prompt, piece.index
        assert key not in reasons, "nothing comes behind the end"
        texts[key] = texts.get(key, "") + piece.text
        if piece.token is not None:
            assert len(piece.token.top) == 2
            tokens.setdefault(key, []).append(piece.token)
        if piece.finish_reason:
            reasons[key] = piece.finish_reason
    for one in whole:
        key = one.prompt, one.index
        assert (tuple(tokens[key]), texts[key]) == (one.tokens, one.text)
        assert reasons[key] == one.finish_reason


def test_a_stop_string_ends_its_text_and_is_no_part_of_it(lm):
    [free] = lm.generate_batch(["In the beginning"], max_new_tokens=60)
    stop = free.text[7:9]
    [one] = lm.generate_batch(["In the beginning"], max_new_tokens=60, stop=[stop])
    assert one.finish_reason == "stop_text"
    assert one.text == free.text[: free.text.index(stop)]
    assert one.token_ids == free.token_ids[: len(one.token_ids)]
    assert len(one.token_ids) < 60


def test_an_iteration_that_is_left_frees_everything(lm):
    pieces = lm.generate_batch(PROMPTS, max_new_tokens=None, stop_token_ids=(), stream=True)
    for _, piece in zip(range(10), pieces, strict=False):
        assert piece.finish_reason is None
    pieces.close()


def test_what_ends_one_ends_the_batch_with_its_error(tmp_path):
    tiny = replace(TINY, nan_token=256)
    lm = load(tiny.write(tmp_path / "bundle").path, threads=1, kernels="none")
    with pytest.raises((InputError, SessionError), match="no token can be chosen"):
        lm.generate_batch([[1, 2], [3, 256]], max_new_tokens=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one text"}, "prompts: expected a list"),
        ({"prompts": 3}, "prompts: expected a list"),
        ({"prompts": [""]}, "the prompt is empty"),
        ({"prompts": [[999]]}, "outside the vocabulary"),
        ({"prompts": ["a"], "n": 0}, "n=0: must be at least 1"),
        ({"prompts": ["a"], "slots": 0}, "slots=0: must be at least 1"),
        ({"prompts": ["a"], "stop": [""]}, "a stop string is empty"),
        ({"prompts": ["a"], "temperature": -1}, "temperature"),
    ],
)
def test_a_batch_that_cannot_be_served_is_refused_in_one_line(lm, arguments, message):
    with pytest.raises((InputError, ValueError), match=message):
        lm.generate_batch(**arguments)
    with pytest.raises((InputError, ValueError), match=message):
        list(lm.generate_batch(**arguments, stream=True))


def test_no_prompts_give_nothing(lm):
    assert lm.generate_batch([]) == []
