"""A bundle reads text as transformers does: its tokenizer is mended at export, or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from lminf_export.export.run import export
from lminf_export.export.tokenizer_check import check_tokenizer
from lminf_export.export.tokenizer_texts import TEXTS
from lminf_export.runtime.added_tokens import role_tokens
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.text import TextCodec
from tests.support.tokenizer_kinds import KINDS, byte_level, llama2

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo-llama"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
MORE = ["<x> the", "a<x>the <y>", "<|user|>a</s>", "<s>a</s> b", "the <tool>."]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def put(folder, tokenizer=None, **files):
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def checked(folder):
    """Check a copy of a model's files; return the notices and the copy."""
    copy = folder.with_name("bundle")
    shutil.copytree(folder, copy)
    notices = check_tokenizer(folder, copy)
    assert all(len(notice) <= 300 and "\n" not in notice for notice in notices)
    return notices, copy


def assert_read_alike(folder, copy):
    """The bundle's codec, and transformers on the bundle, read as transformers on the model."""
    from transformers import AutoTokenizer

    codec = TextCodec(copy / "tokenizer.json")
    for other in (AutoTokenizer.from_pretrained(path) for path in (folder, copy)):
        for text in (*TEXTS, *MORE):
            for special in (False, True):
                wanted = other.encode(text, add_special_tokens=special)
                assert codec.ids(text, add_special_tokens=special) == wanted, text
                decoded = other.decode(wanted, skip_special_tokens=True)
                assert codec.tokenizer.decode(wanted, skip_special_tokens=True) == decoded


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_is_right_is_left_as_it_is(folder, kind):
    put(folder, KINDS[kind](), tokenizer_config={**FAST, "chat_template": CHAT})
    notices, copy = checked(folder)
    assert notices == []
    wanted = (folder / "tokenizer.json").read_bytes()
    assert (copy / "tokenizer.json").read_bytes() == wanted


def test_tokens_beside_the_file_are_written_into_it(folder):
    size = byte_level().get_vocab_size()
    flags = {"lstrip": True, "special": True, "normalized": False}
    table = {size: {"content": "<x>", **flags}, size + 1: {"content": "<y>"}}
    put(folder, byte_level(), tokenizer_config={**FAST, "added_tokens_decoder": table})
    (notice,), copy = checked(folder)
    assert "alone reads" in notice
    assert "is that of transformers' AutoTokenizer" in notice
    assert Tokenizer.from_file(str(copy / "tokenizer.json")).token_to_id("<y>") == size + 1
    assert_read_alike(folder, copy)


def test_what_a_class_of_transformers_adds_is_written(folder):
    """Its start token, its space and its decoder, which the file does not have."""
    tokenizer = llama2()
    tokenizer.post_processor = None
    put(folder, tokenizer, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    _, copy = checked(folder)
    assert_read_alike(folder, copy)


def test_start_tokens_of_a_configuration_without_a_file_are_written(folder):
    vocab = json.loads(byte_level().to_str())["model"]["vocab"]
    merges = json.loads(byte_level().to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    put(
        folder,
        vocab={**vocab, "<|endoftext|>": len(vocab)},
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
    )
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    notices, copy = checked(folder)
    assert any("tokenizer.json is missing" in notice for notice in notices)
    assert_read_alike(folder, copy)


def test_saved_limits_are_taken_out(folder):
    tokenizer = byte_level()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12, pad_id=2, pad_token="</s>")
    put(folder, tokenizer, tokenizer_config=FAST)
    (notice,), copy = checked(folder)
    assert "truncation to 8 tokens and padding" in notice
    written = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    assert written["truncation"] is None
    assert written["padding"] is None
    assert_read_alike(folder, copy)


def test_split_special_tokens_are_split(folder):
    put(folder, byte_level(), tokenizer_config={**FAST, "split_special_tokens": True})
    notices, copy = checked(folder)
    assert notices == []
    assert_read_alike(folder, copy)


def test_another_id_is_named(folder):
    put(folder, byte_level(), tokenizer_config=FAST, added_tokens={"<x>": 9000})
    notices, copy = checked(folder)
    assert any("'<x>' the id 9000" in notice for notice in notices)
    assert_read_alike(folder, copy)


def test_a_tokenizer_that_needs_the_models_code_is_not_compared(folder):
    remote = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    put(folder, byte_level(), tokenizer_config=remote)
    (folder / "tokenization_x.py").write_text("raise SystemExit('ran')")
    (notice,), copy = checked(folder)
    assert "not compared" in notice
    assert TextCodec(copy / "tokenizer.json").encode("the")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": ', "\x00", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    (notice,), _ = checked(folder)
    assert "token ids only" in notice


def test_a_damaged_configuration_is_named_and_the_tokenizer_read(folder):
    put(folder, byte_level())
    (folder / "tokenizer_config.json").write_text("{")
    notices, copy = checked(folder)
    assert any("tokenizer_config.json" in notice for notice in notices)
    assert any("not compared" in notice for notice in notices)
    assert TextCodec(copy / "tokenizer.json").encode("the")


def test_a_model_without_a_tokenizer_needs_none(folder):
    put(folder, tokenizer_config=FAST)
    assert checked(folder)[0] == []


def test_a_chat_is_compared(folder, monkeypatch):
    """A token that only the template writes is found to be read otherwise."""
    monkeypatch.setattr("lminf_export.export.tokenizer_check.texts_of_tokens", lambda tokens: [])
    size = byte_level().get_vocab_size()
    put(
        folder,
        byte_level(),
        tokenizer_config={**FAST, "additional_special_tokens": ["<|user|>"]},
        chat_template={"chat_template": CHAT},
    )
    (notice,), copy = checked(folder)
    assert "reads 1 of" in notice
    assert TextCodec(copy / "tokenizer.json").tokenizer.token_to_id("<|user|>") == size


@pytest.mark.parametrize("template", ["{{ raise_exception('no user') }}", "{% for %}", "{{ 1/0 }}"])
def test_a_chat_template_that_fails_is_named(folder, template):
    put(folder, byte_level(), tokenizer_config=FAST)
    (folder / "chat_template.jinja").write_text(template)
    (notice,), _ = checked(folder)
    assert "chat template" in notice


def test_tokens_that_only_a_class_names_are_written_for_the_template(folder):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    text = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    put(folder, tokenizer, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    (folder / "chat_template.jinja").write_text(text)
    notices, copy = checked(folder)
    assert notices == []
    assert role_tokens(folder) == {}
    assert role_tokens(copy)["bos_token"] == "<|endoftext|>"


def test_a_chat_that_is_written_otherwise_is_named(folder, monkeypatch):
    put(folder, byte_level(), tokenizer_config=FAST)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.setattr(ChatTemplate, "render", lambda *_: "another text")
    (notice,), _ = checked(folder)
    assert "writes another text here than in transformers" in notice


def test_a_tokenizer_of_transformers_that_reads_nothing_is_named(folder, monkeypatch):
    monkeypatch.setattr("lminf_export.export.tokenizer_check._auto_tokenizer", lambda *_: object())
    put(folder, byte_level())
    (notice,), _ = checked(folder)
    assert "not compared" in notice


def test_a_difference_that_stays_is_named(folder, monkeypatch):
    """Where transformers' tokenizer cannot be written, the texts it reads otherwise are named."""

    class Slow:
        def encode(self, text, add_special_tokens):
            return [1, 2]

    monkeypatch.setattr("lminf_export.export.tokenizer_check._auto_tokenizer", lambda *_: Slow())
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    put(folder, tokenizer)
    (notice,), _ = checked(folder)
    assert "the bundle's tokenizer reads" in notice


@pytest.mark.slow
def test_an_exported_bundle_reads_as_its_model_does_and_carries_its_templates(tmp_path):
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tokenizer.enable_truncation(8)
    tokenizer.save(str(model / "tokenizer.json"))
    table = {"<|user|>": size, "<|end|>": size + 1}
    put(model, added_tokens=table, special_tokens_map={"additional_special_tokens": [*table]})
    put(model, chat_template={"chat_template": CHAT})
    templates = ["chat_template.jinja", "additional_chat_templates/tool.jinja"]
    for name in templates:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(CHAT)
    bundle = export(model, tmp_path / "bundle", window_size=64)
    files = [*templates, "chat_template.json", "tokenizer.json", "added_tokens.json"]
    assert all(bundle.manifest.files[name].role == "tokenizer" for name in files)
    notices = " ".join(bundle.manifest.notices)
    assert "truncation to 8 tokens" in notices
    assert "AutoTokenizer" in notices
    text = "<|user|>It is a truth universally acknowledged<|end|>" * 3
    wanted = AutoTokenizer.from_pretrained(DEMO).encode("It is a truth universally acknowledged")
    (start, *words) = wanted
    ids = TextCodec.of(bundle).encode(text)
    assert ids == [start, *([size, *words, size + 1] * 3)]
    other = AutoTokenizer.from_pretrained(bundle.path)
    assert other.encode(text) == ids
    assert set(other.chat_template) == {"default", "tool"}
