"""A stream of text is the decoded whole without its prompt, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lminf_export.runtime.text_stream import StreamDecoder, text_behind
from tests.support import tokenizer_kinds
from tests.support.tokenizer_kinds import KINDS

MADE = {name: make() for name, make in KINDS.items()}
BYTES = ("llama2", "gemma", "unigram", "byte_level")

# Letters that are tokens, and characters of two, three and four bytes that are not.
_PARTS = [*"aathe  .,!'sn\n\né日本語中文🙂ß\ufffd", "<tool>", "é日", "</s>", "  "]
TEXT = st.lists(st.sampled_from(_PARTS), max_size=30).map("".join) | st.text(max_size=30)


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return MADE[request.param]


def streamed(tokenizer, ids, after=()):
    decoder = StreamDecoder(tokenizer, after)
    return [*(decoder.step(token) for token in ids), decoder.flush()]


def begins_character(tokenizer, token):
    """Whether a token of a byte-level or byte-fallback tokenizer begins with a character."""
    string = tokenizer.id_to_token(token)
    if len(string) == 6 and string.startswith("<0x"):
        return int(string[3:5], 16) & 0xC0 != 0x80
    return True


def rest(tokenizer, ids, split):
    """The text behind the prompt; a character cut by the split stands behind it whole."""
    start = split
    while 0 < start < len(ids) and not begins_character(tokenizer, ids[start]):
        start -= 1
    found = behind(tokenizer, ids, start)
    # The replacement character itself, cut apart, is in the prompt's text already.
    assume(start == split or not found.startswith("\ufffd"))
    return found


def behind(tokenizer, ids, split):
    whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:split])
    return text_behind(prompt, whole)


@settings(max_examples=150, deadline=None)
@given(text=TEXT, data=st.data())
@pytest.mark.parametrize("name", KINDS)
def test_the_joined_pieces_are_the_whole_without_the_prompt(name, text, data):
    tokenizer = MADE[name]
    ids = tokenizer.encode(text).ids
    split = data.draw(st.integers(0, len(ids)))
    assert "".join(streamed(tokenizer, ids[split:], ids[:split])) == rest(tokenizer, ids, split)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", [name for name in KINDS if name not in BYTES[:3]])
def test_so_they_are_for_ids_that_are_no_text(name, data):
    tokenizer = MADE[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=40))
    split = data.draw(st.integers(0, len(ids)))
    found = "".join(streamed(tokenizer, ids[split:], ids[:split]))
    assert found == behind(tokenizer, ids, split)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", KINDS)
def test_several_tokens_at_once_have_the_text_of_one_after_another(name, data):
    tokenizer = MADE[name]
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(TEXT)).ids
    else:
        ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=40))
    split = data.draw(st.integers(0, len(ids)))
    decoder, found, start = StreamDecoder(tokenizer, ids[:split]), "", split
    singly = StreamDecoder(tokenizer, ids[:split])
    while start < len(ids):
        end = data.draw(st.integers(start, len(ids)))
        found += decoder.steps(ids[start:end])
        start = end + (end == start)
        found += decoder.steps(ids[end:start])
    assert found == "".join(singly.step(token) for token in ids[split:])
    assert decoder.flush() == singly.flush()


def test_a_replacement_character_that_the_prompt_breaks_off_takes_no_text_behind_it():
    tokenizer = MADE["llama2"]
    ids = tokenizer.encode("haa\ufffd\ufffdaaa").ids
    for split in range(len(ids)):
        singly = StreamDecoder(tokenizer, ids[:split])
        expected = "".join(singly.step(token) for token in ids[split:])
        assert StreamDecoder(tokenizer, ids[:split]).steps(ids[split:]) == expected


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
@pytest.mark.parametrize("name", BYTES)
def test_a_character_comes_with_its_last_token(name, text):
    tokenizer = MADE[name]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    decoder = StreamDecoder(tokenizer)
    shown = ""
    for count, token in enumerate(encoding.ids, 1):
        shown += decoder.step(token)
        if count == len(encoding.ids) or begins_character(tokenizer, encoding.ids[count]):
            whole = tokenizer.decode(encoding.ids[:count])
            # Only a byte-level token can end in the middle of a character.
            cut = name == "byte_level" and whole != shown
            assert whole == shown + "\ufffd" * cut


def test_a_prompt_that_ends_in_bytes_and_an_answer_of_bytes():
    tokenizer = MADE["llama2"]
    prompt, answer = "日本語", "中文"
    ids = tokenizer.encode(prompt + answer).ids
    split = len(tokenizer.encode(prompt).ids)
    assert [p for p in streamed(tokenizer, ids[split:], ids[:split]) if p] == ["中", "文"]


def test_a_long_run_of_bytes_is_never_cut_and_the_space_behind_it_stays():
    tokenizer = MADE["llama2"]
    text = "語" * 40 + " the ß"
    ids = tokenizer.encode(text).ids
    pieces = [piece for piece in streamed(tokenizer, ids) if piece]
    assert "".join(pieces) == text
    assert pieces[:41] == ["語"] * 40 + [" the"]


@pytest.mark.parametrize("name", BYTES)
def test_no_ids_raise_or_pile_up(name):
    tokenizer = MADE[name]
    size = tokenizer.get_vocab_size()
    decoder = StreamDecoder(tokenizer)
    for step in range(5000):
        decoder.step(step * 7919 % size)
        assert sum(map(len, decoder._groups)) <= 8


def test_tokens_without_text_do_not_pile_up():
    tokenizer = MADE["byte_level"]
    decoder = StreamDecoder(tokenizer)
    decoder._bytes = type(decoder._bytes).__mro__[1]()
    for _ in range(1000):
        decoder._show([""])
    assert len(decoder._groups) <= 16


def test_bytes_that_are_no_text_are_replaced_one_by_one():
    tokenizer = MADE["gemma"]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in b"\xe6\x97\xa5\xff\xe6\x97a\xe6"]
    pieces = streamed(tokenizer, ids)
    assert pieces == ["", "", "日", "\ufffd", "", "", "\ufffd\ufffda", "", "\ufffd"]


def test_special_tokens_inside_a_character_do_not_break_it():
    tokenizer = MADE["byte_level"]
    first, *others = tokenizer.encode("日").ids
    end = tokenizer.token_to_id("</s>")
    assert "".join(streamed(tokenizer, [first, end, *others])) == "日"
    assert tokenizer_kinds.byte_level().decode([first, end, *others]) == "日"


def test_the_text_behind_another_one_begins_where_they_part():
    assert text_behind("ab\ufffd", "abc") == "c"
    assert text_behind("abc", "ab") == ""
    assert text_behind("ab", "abc") == "c"
