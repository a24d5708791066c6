"""Damaged tokenizer files end in one line, never in an exception of another library."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.support.mutations import json_text, mutate_json
from lminf_export.errors import LminfError
from lminf_export.export.tokenizer_check import check_tokenizer
from lminf_export.runtime.text import TextCodec
from tests.support.tokenizer_kinds import KINDS

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
    "added_tokens_decoder": {"300": {"content": "<x>", "special": True, "rstrip": True}},
    "additional_special_tokens": ["<y>"],
    "split_special_tokens": False,
    "model_max_length": 10,
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
SIDE = {
    "tokenizer_config.json": CONFIG,
    "special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["<y>", "<z>"]},
    "added_tokens.json": {"<w>": 280, "<x>": 281},
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
}
TEXT = "the a日本 é <x><tool> </s>z"


def read(path):
    """Use a codec as generating does; only our own errors may come out."""
    try:
        codec = TextCodec(path)
        ids = codec.encode(TEXT)
        "".join(codec.stream([*ids, 5, 10**6], after=ids[:2]))
    except LminfError as error:
        line = str(error).replace(str(path), "P")
        assert len(line) <= 300
        assert "\n" not in line
        return []
    return codec.problems


def write(folder, dice, *, of_side_files):
    tokenizer = json.loads(dice.choice(list(KINDS.values()))().to_str())
    raw = json.dumps(tokenizer).encode()
    if not of_side_files:
        raw = json_text(mutate_json(tokenizer, dice), dice)
    (folder / "tokenizer.json").write_bytes(raw)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, content in SIDE.items():
        if dice.random() < 0.7:
            changed = mutate_json(content, dice) if of_side_files else content
            (folder / name).write_bytes(json_text(changed, dice) if of_side_files else b"{}")


def mutants(root: Path, seed: int, count: int, *, of_side_files: bool) -> Iterator[Path]:
    """Yield folders of a mutated tokenizer."""
    dice = random.Random(seed)
    for number in range(count):
        folder = root / str(number)
        folder.mkdir()
        write(folder, dice, of_side_files=of_side_files)
        yield folder


@pytest.mark.parametrize("of_side_files", [True, False])
def test_a_codec_raises_our_errors_only(tmp_path, of_side_files):
    for folder in mutants(tmp_path, 0, 150, of_side_files=of_side_files):
        problems = read(folder / "tokenizer.json")
        assert all(len(line) <= 300 and "\n" not in line for line in problems)


@pytest.mark.slow
@pytest.mark.parametrize("of_side_files", [True, False])
def test_the_check_at_export_raises_nothing(tmp_path, of_side_files):
    for folder in mutants(tmp_path, 1, 100, of_side_files=of_side_files):
        copy = tmp_path / f"{folder.name}-copy"
        shutil.copytree(folder, copy)
        notices = check_tokenizer(folder, copy)
        assert all(len(line) <= 300 and "\n" not in line for line in notices)
        read(copy / "tokenizer.json")
