"""Parts of the server by themselves: text and tokens side by side, hashes, the store of states."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lminf_export.runtime.batching.request import Token
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.text import StopText, TextCodec
from lminf_export.runtime.token_bytes import TokenBytes
from lminf_export.serve.answer_text import AnswerText
from lminf_export.serve.generation import generation_of
from lminf_export.serve.log_probabilities import completion_logprobs, token_name
from lminf_export.serve.openai_schema import ChatFields
from lminf_export.serve.rolling import RollingHash, ids_bytes, messages_bytes
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.state_store import StateStore

TEXT = "Grüße, 世界 🙂🙂 and naïve café; the end."


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """One token for each byte, so that every character of several bytes is torn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("codec") / "tokenizer.json"
    tokenizer.save(str(path))
    return TextCodec(path)


def tokens_of(codec, text):
    return [Token(i, -0.5, ((i, -0.5),)) for i in codec.tokenizer.encode(text).ids]


@pytest.mark.parametrize("stop", [(), ("世",), ("🙂 and",), ("naïve", "café"), ("nowhere",)])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_and_tokens_come_together(codec, stop, size):
    tokens = tokens_of(codec, TEXT)
    answer = AnswerText(codec, (), stop, True)
    pieces = [answer.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    pieces.append(answer.finish())
    text = "".join(piece.text for piece in pieces)
    plain = AnswerText(codec, (), stop, False)
    parts = [plain.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    assert "".join(piece.text for piece in (*parts, plain.finish())) == text
    assert plain.stopped == answer.stopped
    ends = [TEXT.index(s) for s in stop if s in TEXT]
    assert text == TEXT[: min(ends, default=None)]
    assert answer.stopped == bool(ends)
    placed = [entry for piece in pieces for entry in piece.tokens]
    names = TokenBytes(codec.tokenizer)
    assert b"".join(names.of(entry.token.id) for entry in placed).decode() == text
    shown = ""
    for piece in pieces:
        # A token is told with the piece that its text is in.
        for entry in piece.tokens:
            assert len(shown) <= entry.offset <= len(shown + piece.text)
        shown += piece.text
    listed = completion_logprobs(placed, names)
    assert listed["text_offset"] == sorted(listed["text_offset"])


def test_a_stop_is_seen_with_the_token_that_completes_it(codec):
    watch = StopText(codec, (), ("世界",))
    seen = [watch(token.id) for token in tokens_of(codec, "Grüße, 世界 and")]
    assert seen.index(True) == len("Grüße, 世界".encode()) - 1


def test_a_part_of_a_character_is_named_by_its_bytes(codec):
    names = TokenBytes(codec.tokenizer)
    ids = codec.tokenizer.encode("ü").ids
    assert [token_name(i, names) for i in ids] == ["bytes:\\xc3", "bytes:\\xbc"]


def test_a_rolling_hash_is_that_of_all_bytes_however_they_came():
    data = random.Random(1).randbytes(5000)
    whole = RollingHash().then(data)
    for places in ([0], [1, 1, 7], [4999], list(range(0, 5000, 97))):
        parts, start = RollingHash(), 0
        for end in [*places, len(data)]:
            parts, start = parts.then(data[start:end]), end
        assert parts == whole
    assert whole.begins(data + b"more")
    assert not whole.begins(data[:-1])
    assert not whole.begins(b"\0" + data)
    assert RollingHash().then(b"\0") != RollingHash()
    assert RollingHash(whole.length, int(whole.digits, 16)) == whole


def test_messages_are_told_apart():
    def hashed(*pairs):
        return RollingHash().then(messages_bytes([{"role": r, "content": c} for r, c in pairs]))

    lists = [
        (("user", "a"),), (("user", "a"), ("user", "")), (("user", "a\n"),), (("system", "a"),),
        (("user", 'a"]\n["user", "b'),), (("user", "a"), ("user", "b")), (("user", "ü"),),
    ]  # fmt: skip
    assert len({hashed(*pairs) for pairs in lists}) == len(lists)


class _Sized(Snapshot):
    """A snapshot of a size, with no caches."""

    def __init__(self, nbytes: int, length: int) -> None:
        object.__setattr__(self, "size", nbytes)
        object.__setattr__(self, "past_length", np.array([length]))

    @property
    def nbytes(self) -> int:
        return self.size


def test_the_longest_prefix_is_found_and_the_least_used_makes_room():
    store = StateStore(0, 3 * (1000 + 4096))
    ids = list(range(100))

    def keep(scope, count):
        prefix = RollingHash().then(ids_bytes(ids[:count]))
        store.keep_prefix(scope, prefix, _Sized(1000, count))

    def found(scope, asked):
        snapshot = store.longest_prefix(scope, asked)
        return None if snapshot is None else int(snapshot.past_length[0])

    for count in (10, 50, 20):
        keep("a", count)
    assert found("a", ids) == 50
    assert found("a", ids[:50]) == 20
    assert found("a", [*ids[:30], 7]) == 20
    assert found("a", [7, *ids]) is None
    assert found("b", ids) is None
    keep("b", 30)
    assert found("a", ids[:15]) is None
    assert store.counts().prefixes == 3
    assert store.counts().nbytes == 3 * (1000 + 4096)
    store.keep_prefix("a", RollingHash().then(ids_bytes(ids)), _Sized(10**9, 100))
    assert found("a", [*ids, 1]) == 50


def test_what_ends_an_answer_in_the_template_ends_a_chat(demo_lm):
    """Though the model's files do not name it."""
    text = "{% for m in messages %}{{ m.content }}{{ bos_token }}{% endfor %}"
    settings = ServeSettings(slots=1)
    template = ChatTemplate(text, {"bos_token": "<|bos|>"})
    model = ServedModel.of("demo", demo_lm, settings, template)
    model.engine.close()
    manifest = demo_lm.bundle.manifest
    fields = ChatFields(model="demo", messages=[{"role": "user", "content": "Hi"}])
    assert model.end_ids == {0}
    assert generation_of(fields, settings, manifest, model.end_ids).stop_token_ids == {0}
    assert generation_of(fields, settings, manifest).stop_token_ids is None
    fields.ignore_eos = True
    assert generation_of(fields, settings, manifest, model.end_ids).stop_token_ids == frozenset()
