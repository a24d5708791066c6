"""The rules by which byte-level tokenizers cut a text, by GGUF's names (`tokenizer.ggml.pre`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2: dict[str, Any] = {**_BYTES, "use_regex": True}
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
)
_CASED_END = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}|" + _CASED_END
_GPT4O = _CASED.replace("{0}", _SHORT + "?") + r"|\p{N}{1,3}|" + _CASED_END
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_NFC = {"type": "NFC"}


@dataclass(frozen=True)
class Split:
    """How a byte-level tokenizer prepares a text.

    Attributes:
        pre_tokenizer: as tokenizer.json has it.
        normalizer: as tokenizer.json has it, or None.
        ignores_merges: a piece that is a token is not cut further.
        adds_bos: the first token is put before a text where the file does not say.
    """

    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignores_merges: bool = False
    adds_bos: bool = False


def _sequence(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [dict(part) for part in parts]}


def _by(pattern: str) -> dict[str, Any]:
    """Cut by a regular expression, then take bytes."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return _sequence(split, _BYTES)


_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, _GPT2)
_FALCON = _sequence(
    {"type": "Punctuation", "behavior": "Contiguous"},
    _GPT2,
    {"type": "Digits", "individual_digits": False},
    {
        "type": "Split",
        "pattern": {"Regex": "[0-9][0-9][0-9]"},
        "behavior": "Isolated",
        "invert": False,
    },
)
_RULES: Mapping[tuple[str, ...], Split] = {
    ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"): Split(
        _GPT2
    ),
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"): Split(
        _DIGITS
    ),
    ("falcon",): Split(_FALCON),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"): Split(_by(_QWEN2), _NFC),
    ("stablelm2",): Split(_by(_QWEN2)),
    (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano"),
    ): Split(_by(_LLAMA3), ignores_merges=True, adds_bos=True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): Split(_by(_LLAMA3)),
    ("tekken",): Split(_by(_TEKKEN), ignores_merges=True, adds_bos=True),
    ("gpt-4o", "llama4", "kanana2"): Split(_by(_GPT4O)),
    ("bloom", "gpt3-finnish", "poro-chat"): Split(_by(_BLOOM)),
}


def _names() -> Iterator[tuple[str, Split]]:
    for names, split in _RULES.items():
        yield from ((name, split) for name in names)


SPLITS: Mapping[str, Split] = dict(_names())
