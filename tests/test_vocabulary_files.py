"""Vocabularies of SentencePiece and tiktoken are converted, and read texts as these do."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lminf_export import export
from lminf_export.export.tokenizer_check import check_tokenizer
from lminf_export.export.tokenizer_texts import TEXTS
from lminf_export.export.vocabulary_files import find_vocabulary
from tests.support.tiny_models import save_llama

ROOT = Path(__file__).resolve().parents[1]
CORPUS = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


def trained(kind: str, **settings) -> bytes:
    """Train sentencepiece on a page of the documentation."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=written,
        model_type=kind,
        vocab_size=500,
        num_threads=1,
        minloglevel=2,
        user_defined_symbols=["<extra>"],
        **settings,
    )
    return written.getvalue()


def ranks() -> bytes:
    """Merge pairs of bytes as tiktoken's files have them."""
    pytest.importorskip("tiktoken")
    tokens = [bytes([number]) for number in range(256)]
    words = [[bytes([x]) for x in word.encode()] for word in sorted(set(CORPUS.split()))]
    while len(tokens) < 400:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        if left + right not in tokens:
            tokens.append(left + right)
        for word in words:
            for place in range(len(word) - 1, 0, -1):
                if word[place - 1 : place + 1] == [left, right]:
                    word[place - 1 : place + 1] = [left + right]
    lines = (b"%s %d\n" % (base64.b64encode(x), rank) for rank, x in enumerate(tokens))
    return b"".join(lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "m", vocab_size=600)


def converted(folder: Path, content: dict[str, bytes | dict]) -> tuple[Tokenizer, list[str]]:
    """Convert a folder's vocabulary; return the bundle's tokenizer and the notices."""
    (folder / "m").mkdir()
    (folder / "b").mkdir()
    config = {"model_type": "llama", "vocab_size": 600}
    for name, data in {"config.json": config, **content}.items():
        data = json.dumps(data).encode() if isinstance(data, dict) else data
        for place in ("m", "b"):
            (folder / place / name).write_bytes(data)
    notices = check_tokenizer(folder / "m", folder / "b")
    return Tokenizer.from_file(str(folder / "b" / "tokenizer.json")), notices


SENTENCEPIECE = {
    "bpe as Llama 2": ("bpe", {"normalization_rule_name": "identity", "byte_fallback": True}),
    "bpe that normalises": ("bpe", {"byte_fallback": True}),
    "unigram": ("unigram", {}),
    "bpe as Gemma": (
        "bpe",
        {
            "normalization_rule_name": "identity",
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        },
    ),
}


@pytest.mark.parametrize("config", [{}, LLAMA], ids=["bare", "LlamaTokenizer"])
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_alone_becomes_a_tokenizer_that_reads_as_it_does(kind, config, tmp_path):
    name, settings = SENTENCEPIECE[kind]
    files = {"tokenizer.model": trained(name, **settings)}
    files |= {"tokenizer_config.json": config} if config else {}
    ours, notices = converted(tmp_path, files)
    assert f"it reads {len(TEXTS)} texts as sentencepiece does" in notices[0]
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(
        model_proto=files["tokenizer.model"]
    )
    for text in (*TEXTS, *CORPUS.splitlines()[:40]):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text), text
        if processor.unk_id() not in ids:
            assert ours.decode(ids) == processor.decode(ids), text
    start = [1] if config else []
    assert ours.encode("a").ids == [*start, *processor.encode("a")]
    assert 1 in ours.encode("a <s> b").ids


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tiktoken.model", "qwen.tiktoken", "x.tiktoken"]
)
def test_tiktoken_alone_becomes_a_tokenizer_that_reads_as_it_does(name, tmp_path):
    tiktoken, data = pytest.importorskip("tiktoken"), ranks()
    ours, notices = converted(tmp_path, {name: data})
    assert f"it reads {len(TEXTS)} texts as tiktoken does" in notices[0]
    whose = "Qwen" if name.startswith("qwen") else "Llama 3"
    assert f"cut as {whose} does" in notices[1]
    found = find_vocabulary(tmp_path / "m")
    theirs = found.reader()
    for text in CORPUS.splitlines()[:40]:
        assert ours.encode(text).ids == theirs(text), text
        assert ours.decode(theirs(text)) == text
    assert tiktoken.__name__ == found.library
    digits = ours.encode("1234").tokens
    assert digits == ["1", "2", "3", "4"]
    if whose == "Qwen":
        assert ours.token_to_id("<|im_start|>") == 401


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    """tiktoken keeps files by their path."""
    data = ranks()
    for turn in range(2):
        (tmp_path / str(turn)).mkdir()
    first, _ = converted(tmp_path / "0", {"tokenizer.model": data})
    path = tmp_path / "0" / "m" / "tokenizer.model"
    lines = data.splitlines()
    swapped = [*lines[:-2], lines[-1].split()[0] + b" 398", lines[-2].split()[0] + b" 399"]
    path.write_bytes(b"\n".join(swapped) + b"\n")
    (tmp_path / "0" / "b" / "tokenizer.json").unlink()
    check_tokenizer(tmp_path / "0" / "m", tmp_path / "0" / "b")
    second = Tokenizer.from_file(str(tmp_path / "0" / "b" / "tokenizer.json"))
    assert first.id_to_token(398) == second.id_to_token(399)


TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_tekken_is_read_by_transformers(tmp_path):
    tokens = [line.split() for line in ranks().splitlines()]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    content = {
        "config": {
            "pattern": TEKKEN,
            "num_vocab_tokens": 1000,
            "default_vocab_size": 405,
            "default_num_special_tokens": 5,
            "version": "v3",
        },
        "vocab": [
            {"rank": int(rank), "token_bytes": text.decode(), "token_str": None}
            for text, rank in tokens
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True}
            for rank, name in enumerate(special)
        ],
    }
    ours, notices = converted(tmp_path, {"tekken.json": content})
    assert "the bundle's is that of transformers' AutoTokenizer" in notices[0]
    assert ours.decode(ours.encode("a 日本 text").ids) == "a 日本 text"


@pytest.mark.parametrize("library", ["sentencepiece", "tiktoken"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(library, tmp_path, monkeypatch):
    data = trained("bpe") if library == "sentencepiece" else ranks()
    for place in ("m", "b"):
        (tmp_path / place).mkdir()
    (tmp_path / "m" / "tokenizer.model").write_bytes(data)
    monkeypatch.setitem(sys.modules, library, None)
    [notice] = check_tokenizer(tmp_path / "m", tmp_path / "b")
    assert f"converting it takes {library}" in notice
    assert "pip install 'lminf-export[tokenizers]'" in notice
    assert len(notice) < 300
    assert not (tmp_path / "b" / "tokenizer.json").exists()


def test_a_damaged_vocabulary_leaves_a_bundle_of_token_ids(tmp_path):
    pytest.importorskip("sentencepiece")
    for place in ("m", "b"):
        (tmp_path / place).mkdir()
    (tmp_path / "m" / "tokenizer.model").write_bytes(trained("bpe")[:300])
    [notice] = check_tokenizer(tmp_path / "m", tmp_path / "b")
    assert notice.startswith("the bundle takes token ids only; tokenizer.model is damaged")


@pytest.mark.slow
def test_an_export_writes_the_converted_tokenizer(model, tmp_path):
    (model / "tokenizer.json").unlink(missing_ok=True)
    (model / "tokenizer.model").write_bytes(trained("bpe", byte_fallback=True))
    bundle = export(model, tmp_path / "b", window_size=16, chunk_size=8)
    assert bundle.tokenizer_path is not None
    assert any("as sentencepiece does" in notice for notice in bundle.manifest.notices)
