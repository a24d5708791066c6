"""Text: characters come out whole, stop strings never come out, nothing is lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from lminf_export.errors import BundleError, InputError
from lminf_export.runtime.text import StopStrings, StreamDecoder, TextCodec
from tests.support.tiny_bundle import TinyModel, byte_tokenizer
from tests.support.tokenizer_kinds import llama2


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return TextCodec(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_pieces_join_to_the_text_and_every_piece_is_whole(codec, text):
    pieces = list(codec.stream(codec.encode(text)))
    assert "".join(pieces) == text
    assert all(pieces)


def test_a_character_of_four_bytes_comes_as_one_piece(codec):
    assert list(codec.stream(codec.encode("a🙂é"))) == ["a", "🙂", "é"]


def test_a_text_that_breaks_off_inside_a_character_ends_with_a_replacement_mark(codec):
    ids = codec.encode("a🙂")
    assert "".join(codec.stream(ids[:-1])) == "a�"


def test_endless_bytes_that_are_no_text_neither_stop_the_stream_nor_pile_up(codec):
    wrong = byte_tokenizer().token_to_id("ÿ")  # the byte 0xFF, part of no character
    decoder = StreamDecoder(codec.tokenizer)
    pieces = [decoder.step(wrong) for _ in range(100)]
    assert sum(bool(piece) for piece in pieces) >= 5
    assert set("".join(pieces)) == {"�"}
    # What follows is text again.
    assert "".join(map(decoder.step, codec.encode("ok"))).endswith("ok")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=60))
def test_no_sequence_of_tokens_raises(codec, ids):
    "".join(codec.stream(ids))


def test_special_tokens_are_not_text(codec):
    end = codec.tokenizer.token_to_id("<eos>")
    assert "".join(codec.stream([*codec.encode("ab"), end, *codec.encode("c")])) == "abc"


def test_the_first_word_is_spaced_as_its_place_behind_the_prompt_asks():
    tokenizer = Tokenizer(models.WordLevel({"▁in": 0, "▁the": 1}, unk_token="▁in"))
    tokenizer.decoder = decoders.Metaspace()
    alone, behind = StreamDecoder(tokenizer), StreamDecoder(tokenizer, after=[0])
    assert alone.step(1) == "the"
    assert behind.step(1) == " the"


def test_an_empty_prompt_is_refused(codec):
    with pytest.raises(InputError, match="the prompt is empty"):
        codec.encode("")


def test_a_bundle_without_a_tokenizer_says_so(tmp_path):
    bundle = TinyModel().write(tmp_path / "b", tokenizer=False)
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        TextCodec.of(bundle)


def test_a_damaged_tokenizer_says_so(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        TextCodec(tmp_path / "tokenizer.json")


def passed(pieces, stop):
    stops = StopStrings(stop)
    text = "".join(map(stops.push, pieces))
    return text + stops.flush(), stops.found


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text, stop, cuts):
    edges = sorted({0, len(text), *(c for c in cuts if c <= len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    found, which = passed(pieces, stop)
    if which is None:
        assert found == text
        assert not any(s in text for s in stop)
    else:
        assert text.startswith(found + which)
    assert not any(s in found for s in stop)


def test_of_two_stop_strings_the_earlier_one_ends_the_text():
    assert passed(["hello wor", "ld bye"], ["world", "lo"]) == ("hel", "lo")


def test_a_held_back_beginning_is_passed_on_when_it_comes_to_nothing():
    stops = StopStrings(["\n\nEND"])
    assert stops.push("a\n") == "a"
    assert stops.push("\nE") == ""
    assert stops.push("x") == "\n\nEx"
    assert stops.push("\n") == ""
    assert stops.flush() == "\n"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop string is empty"):
        StopStrings(["a", ""])


def test_no_token_is_asked_for_behind_a_stop_string(codec):
    asked = []

    def endless():
        for token in codec.encode("one STOP two"):
            asked.append(token)
            yield token

    assert "".join(codec.stream(endless(), stop=["STOP"])) == "one "
    assert len(asked) == len("one STOP")


def test_a_length_saved_with_the_tokenizer_neither_cuts_nor_pads_a_prompt(tmp_path):
    tokenizer = byte_tokenizer()
    plain = tokenizer.encode("a text of some length").ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json")
    assert codec.encode("a text of some length") == plain
    assert codec.tokenizer.encode("x").ids == byte_tokenizer().encode("x").ids


def test_a_prompt_of_bytes_that_are_no_text_is_refused(codec):
    with pytest.raises(InputError, match="not UTF-8"):
        codec.encode(b"a\xff".decode("utf-8", "surrogateescape"))


def damaged(folder, part, **changes):
    """A tokenizer.json that loads, with one of its parts changed."""
    content = json.loads(llama2().to_str())
    content[part].update(changes)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return TextCodec(path)


def test_a_tokenizer_that_panics_is_an_error_of_one_line(tmp_path):
    codec = damaged(tmp_path, "post_processor", special_tokens={})
    with pytest.raises(InputError, match="the tokenizer cannot read this text: "):
        codec.encode("a")


def test_a_decoder_that_panics_is_an_error_of_one_line(tmp_path):
    empty = {"type": "Replace", "pattern": {"String": "a"}, "content": ""}
    strip = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    codec = damaged(tmp_path, "decoder", decoders=[empty, strip])
    with pytest.raises(BundleError, match="decoder cannot be used: "):
        list(codec.stream([codec.tokenizer.token_to_id("a")]))
