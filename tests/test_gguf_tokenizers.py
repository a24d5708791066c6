"""Tokenizers of GGUF files read texts as those that they were written from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from benchmarks.support.gguf_files import save_gguf
from lminf_export.checkpoint.source import open_source
from lminf_export.export.tokenizer_check import check_tokenizer
from tests.support.tiny_models import save_llama

ROOT = Path(__file__).resolve().parents[1]
CORPUS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))][:12]
TEXTS = [
    *("Hello world", " leading", "trailing ", "two  spaces   three", "\n\nlines\n\n\n", "a\tb"),
    *("日本語のテキスト", "naïve café Œuvre", "🙂🙂 emoji", "1234567 12.5 1e9", "don't we'll I'VE"),
    *("def f(x):\n    return x  # comment", "<s>not special</s>", "", " ", "   "),
    *(text[1000:1400] for text in CORPUS),
]
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "m", vocab_size=1200)


def read(model: Path, path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """Write a model with a tokenizer as GGUF; return the tokenizer that is read of it."""
    metadata = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    source = open_source(save_gguf(model, path / "m.gguf", metadata=metadata))
    return Tokenizer.from_file(str(source.folder / "tokenizer.json"))


def trained(kind: str, **settings: Any) -> Any:
    """Train sentencepiece on the documentation."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(CORPUS).splitlines()),
        model_writer=written,
        model_type=kind,
        vocab_size=1000,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def vocabulary(own: Any) -> dict[str, Any]:
    """Return tokens, scores and kinds as a conversion writes them."""
    ids = range(own.vocab_size())
    kinds = [
        UNKNOWN if own.is_unknown(i) else CONTROL if own.is_control(i) else BYTE if own.is_byte(i)
        else NORMAL
        for i in ids
    ]  # fmt: skip
    tokens = [own.id_to_piece(i) for i in ids]
    return {"tokens": tokens, "scores": [own.get_score(i) for i in ids], "token_type": kinds}


LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "character_coverage": 0.995}
LLAMA |= {"remove_extra_whitespaces": False, "split_digits": True}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_with_scores(prefix, model, tmp_path):
    symbols = [] if prefix else ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁"]
    own = trained("bpe", add_dummy_prefix=prefix, user_defined_symbols=symbols, **LLAMA)
    words = vocabulary(own)
    for symbol in symbols:
        index = own.piece_to_id(symbol)
        words["token_type"][index], words["scores"][index] = USER, -1000.0
        words["tokens"][index] = symbol.replace("▁", " ")
    words |= {"tokens": [*words["tokens"], "[PAD1000]"], "scores": [*words["scores"], -1e4]}
    words["token_type"] = [*words["token_type"], UNUSED]
    settings = {"model": "llama", "unknown_token_id": 0, "add_space_prefix": prefix}
    ours = read(model, tmp_path, {**words, **settings})
    for text in TEXTS:
        if "<s>" in text or not text:
            continue  # sentencepiece does not read special tokens in a text
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == own.encode(text), text
        assert ours.decode(ids) == own.decode(ids)
        assert ours.encode(text).ids == [1, *ids]  # this kind begins with <s> unless told otherwise
    assert ours.encode("<s>a", add_special_tokens=False).ids[0] == 1
    assert ours.get_vocab_size() == 1000


def test_unigram(model, tmp_path):
    own = trained("unigram")
    written = own.serialized_model_proto()
    parts = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = parts.ModelProto.FromString(written)
    settings: dict[str, Any] = {
        "model": "t5",
        "unknown_token_id": 0,
        "add_eos_token": True,
        "precompiled_charsmap": list(proto.normalizer_spec.precompiled_charsmap),
    }
    ours = read(model, tmp_path, {**vocabulary(own), **settings})
    for text in TEXTS:
        if "<s>" not in text and text.strip():
            assert ours.encode(text, add_special_tokens=False).ids == own.encode(text), text
            assert ours.encode(text).ids == [*own.encode(text), 2]


DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


CUTS = {
    "gpt-2": GPT2,
    "starcoder": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "llama-bpe": split(LLAMA3),
    "qwen2": split(LLAMA3.replace("{1,3}", "")),
}


def byte_level(name: str) -> Tokenizer:
    """Train a tokenizer of bytes as models of a rule have it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = CUTS[name]
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_end|>"]
    trainer = BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool ü>", normalized=False)])
    tokenizer.add_special_tokens(["<｜end｜>"])
    return tokenizer


def merges_of(tokenizer: Tokenizer) -> list[str]:
    found = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in found]


@pytest.mark.parametrize("name", CUTS)
def test_byte_level(name, model, tmp_path):
    own = byte_level(name)
    size = own.get_vocab_size()
    tokens = [own.id_to_token(i) for i in range(size)]
    kinds = [NORMAL] * size
    for index, token in own.get_added_tokens_decoder().items():
        kinds[index] = CONTROL if token.special else USER
    words = {
        "model": "gpt2",
        "pre": name,
        "tokens": [*tokens, "[PAD0]", "[PAD0]"],
        "token_type": [*kinds, UNUSED, UNUSED],
        "merges": merges_of(own),
        "bos_token_id": tokens.index("<s>"),
    }
    ours = read(model, tmp_path, words)
    begin = [tokens.index("<s>")] if name == "llama-bpe" else []
    for text in (*TEXTS, "a<tool ü>b<｜end｜> <|im_end|>\n"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == own.encode(text, add_special_tokens=False).ids, text
        assert ours.encode(text).ids == [*begin, *ids]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == own.decode(
                ids, skip_special_tokens=skip
            )


def test_a_rule_that_is_not_known_leaves_the_tokenizer_out(model, tmp_path):
    words = {"model": "gpt2", "pre": "new-rule", "tokens": ["a", "b"], "token_type": [1, 1]}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    source = open_source(save_gguf(model, tmp_path / "m.gguf", metadata=metadata))
    assert not (source.folder / "tokenizer.json").exists()
    assert source.gguf is not None
    (notice,) = source.gguf.notices
    assert "rule 'new-rule'" in notice
    assert "token ids only" in notice


def test_template_stop_tokens_and_licence_are_taken_along(model, tmp_path):
    own = byte_level("gpt-2")
    tokens = [own.id_to_token(i) for i in range(own.get_vocab_size())]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges_of(own),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
        "tokenizer.chat_template.tool_use": "tools",
        "general.license": "apache-2.0",
    }
    source = open_source(save_gguf(model, tmp_path / "m.gguf", metadata=metadata))
    generation = json.loads((source.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 2]  # the end of a turn stops a chat
    theirs = AutoTokenizer.from_pretrained(source.folder)
    assert theirs.eos_token == "</s>"
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "Hi<|im_end|>"
    assert (source.folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert "license: apache-2.0" in (source.folder / "README.md").read_text()
    assert check_tokenizer(source.folder, source.folder) == []
