"""Tokens beside tokenizer.json are read as transformers reads them; other ids are named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lminf_export.runtime.added_tokens import merge_added_tokens
from lminf_export.runtime.text import TextCodec
from tests.support.tokenizer_kinds import KINDS, byte_level, llama2

CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}
TEXTS = ["a<x> the", "<x><y>", " <y> the<x>the", "the<z>", "<s> a </s>", "THE <X> the", "the ab"]


def write(folder, tokenizer=None, **files):
    """A model folder with these JSON files beside its tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": CONFIG, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same(folder):
    codec, other = TextCodec(folder / "tokenizer.json"), theirs(folder)
    for text in TEXTS:
        for special in (False, True):
            ids = other.encode(text, add_special_tokens=special)
            assert codec.ids(text, add_special_tokens=special) == ids, text
            assert codec.tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=True)
    return codec


def size(tokenizer):
    return tokenizer.get_vocab_size()


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_json_is_merged(tmp_path, kind):
    tokenizer = KINDS[kind]()
    added = {"<y>": size(tokenizer) + 1, "<x>": size(tokenizer)}
    codec = assert_same(write(tmp_path / "m", tokenizer, added_tokens=added))
    assert codec.problems == []
    # A normaliser that puts a space first puts one before the added token, too.
    assert added["<x>"] in codec.ids("a<x>" if kind != "llama2" else "<x>")


def test_the_special_tokens_map_is_merged(tmp_path):
    tokens = {
        "bos_token": {"content": "<x>", "lstrip": True, "rstrip": False, "normalized": False},
        "additional_special_tokens": ["<y>", "<z>"],
        "pad_token": "</s>",
    }
    codec = assert_same(write(tmp_path / "m", special_tokens_map=tokens))
    assert codec.problems == []
    assert codec.tokenizer.decode(codec.ids("a<y>")) == "a"


def test_the_special_tokens_of_the_configuration_are_merged(tmp_path):
    config = {**CONFIG, "additional_special_tokens": ["<x>", "<y>"], "eos_token": "<z>"}
    codec = assert_same(write(tmp_path / "m", tokenizer_config=config))
    assert [codec.tokenizer.token_to_id(t) for t in ("<z>", "<x>", "<y>")] == [
        size(byte_level()) + place for place in range(3)
    ]


FLAGS = st.fixed_dictionaries(
    {flag: st.booleans() for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.sampled_from(["<x>", "<y>", "<z>", "the", "</s>"]), unique=True),
    flags=st.lists(FLAGS, min_size=5, max_size=5),
    extra=st.lists(st.sampled_from(["<x>", "<w>", "the"]), unique=True),
    roles=st.dictionaries(
        st.sampled_from(["bos_token", "eos_token", "pad_token", "image_token"]),
        st.sampled_from(["<x>", "<s>", "<v>", "ab"]),
    ),
    split=st.booleans(),
    kind=st.sampled_from([llama2, byte_level]),
)
def test_the_table_of_added_tokens_is_merged_with_its_flags(
    tmp_path_factory, tokens, flags, extra, roles, split, kind
):
    tokenizer = kind()
    new = [token for token in tokens if tokenizer.token_to_id(token) is None]
    numbers = {token: size(tokenizer) + place for place, token in enumerate(new)}
    decoder = {
        numbers.get(token, tokenizer.token_to_id(token)): {"content": token, **own}
        for token, own in zip(tokens, flags, strict=False)
    }
    config = {
        **CONFIG,
        **roles,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": extra,
        "split_special_tokens": split,
    }
    folder = write(tmp_path_factory.mktemp("m") / "m", tokenizer, tokenizer_config=config)
    assert assert_same(folder).problems == []


ROLES = ["bos_token", "eos_token", "pad_token", "image_token"]


@settings(max_examples=60, deadline=None)
@given(
    added=st.lists(st.sampled_from(["<x>", "<y>", "<z>"]), unique=True),
    contents=st.permutations(["<x>", "<s>", "<v>", "ab", "the", "<y>", "<w>"]),
    flags=FLAGS,
    places=st.lists(st.sampled_from(["map", "map_flags", "config", None]), min_size=4, max_size=4),
    extra=st.sampled_from(["map", "config", "both", None]),
    kind=st.sampled_from([llama2, byte_level]),
)
def test_the_older_files_are_merged_with_one_another(
    tmp_path_factory, added, contents, flags, places, extra, kind
):
    tokenizer = kind()
    config, tokens = dict(CONFIG), {}
    for role, place, content in zip(ROLES, places, contents, strict=False):
        if place == "config":
            config[role] = content
        elif place is not None:
            entry = {"content": content, **flags}
            entry.pop("special")
            tokens[role] = entry if place == "map_flags" else content
    for table, place in ((tokens, "map"), (config, "config")):
        if extra in (place, "both"):
            table["additional_special_tokens"] = contents[4:]
    folder = write(
        tmp_path_factory.mktemp("m") / "m",
        tokenizer,
        tokenizer_config=config,
        special_tokens_map=tokens,
        added_tokens={token: size(tokenizer) + place for place, token in enumerate(added)},
    )
    assert assert_same(folder).problems == []


def test_a_token_with_another_id_is_named(tmp_path):
    folder = write(tmp_path / "m", added_tokens={"<x>": 5000, "<y>": 5001})
    codec = assert_same(folder)
    (problem,) = codec.problems
    assert "'<x>' the id 5000 (and 1 more)" in problem
    assert f"makes it {size(byte_level())}" in problem
    assert len(problem) <= 300


def test_a_known_token_with_another_id_is_named(tmp_path):
    (problem,) = TextCodec(
        write(tmp_path / "m", added_tokens={"</s>": 7}) / "tokenizer.json"
    ).problems
    assert "'</s>' the id 7, tokenizer.json makes it 2" in problem


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", "{"),
        ("added_tokens.json", "[1, 2]"),
        ("added_tokens.json", '{"<x>": "ten"}'),
        ("added_tokens.json", '{"<x>": [5]}'),
        ("special_tokens_map.json", "\udcff"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": 7}, "x": {}}}'),
    ],
)
def test_a_damaged_file_is_named_and_left_out(tmp_path, name, content):
    folder = write(tmp_path / "m")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    codec = TextCodec(folder / "tokenizer.json")
    assert codec.problems
    assert all(name in problem and len(problem) <= 300 for problem in codec.problems)
    assert codec.ids("the") == byte_level().encode("the", add_special_tokens=False).ids


def test_only_named_files_are_read(tmp_path):
    folder = write(tmp_path / "m", added_tokens={"<x>": size(byte_level())})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert merge_added_tokens(tokenizer, folder, ["tokenizer_config.json"]) == []
    assert tokenizer.token_to_id("<x>") is None
