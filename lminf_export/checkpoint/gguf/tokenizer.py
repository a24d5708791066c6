"""The tokenizer of a GGUF model, as files of Hugging Face: tokenizer.json and its settings.

GGUF has the vocabulary, the merges or scores, and a name for the rule by which a text is cut before
they apply (`tokenizer.ggml.pre`). The rest of a tokenizer follows from its kind.
"""

from __future__ import annotations

import base64
from typing import Any

from lminf_export.checkpoint.gguf.metadata import Gguf
from lminf_export.checkpoint.gguf.splits import SPLITS, Split
from lminf_export.errors import ModelError, shortened

_MOST_TOKENS = 2**22
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
_SPACE = "▁"
# Role → GGUF's name in the key of its id.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class TokenizerFiles:
    """Contents of the tokenizer's files.

    Attributes:
        tokenizer: of tokenizer.json; None for a kind that is not read.
        settings: of tokenizer_config.json.
        notice: why there is no tokenizer, or what is doubtful about it; None for nothing.
    """

    def __init__(self, gguf: Gguf) -> None:
        self._gguf = gguf
        self.notice: str | None = None
        self.tokens = gguf.texts("tokenizer.ggml.tokens")
        if len(self.tokens) > _MOST_TOKENS:
            raise ModelError(f"GGUF file {shortened(gguf.name)} has {len(self.tokens)} tokens")
        self._kinds = self._list_of("token_type", int) or [1] * len(self.tokens)
        # Of more tokens than the model has rows for, the rest is never read or written.
        rows = gguf.shape("token_embd.weight")[0]
        self._kinds[rows:] = [_UNUSED] * len(self._kinds[rows:])
        self._ids = {
            role: gguf.integer(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()
        }
        self._split: Split | None = None
        self.tokenizer = self._made()
        self.settings = self._settings()

    def _list_of(self, key: str, kind: type) -> list[Any]:
        found = self._gguf.numbers(f"tokenizer.ggml.{key}")
        if found and len(found) != len(self.tokens):
            raise ModelError(
                f"GGUF file {shortened(self._gguf.name)} has {len(self.tokens)} tokens and "
                f"{len(found)} items in tokenizer.ggml.{key}; it is damaged"
            )
        return [kind(item) for item in found]

    def _made(self) -> dict[str, Any] | None:
        kind = self._gguf.text("tokenizer.ggml.model")
        if kind is None or not self.tokens:
            self.notice = "the GGUF file holds no tokenizer: the bundle takes token ids only"
            return None
        makers = {"gpt2": self._byte_level, "llama": self._sentencepiece, "t5": self._unigram}
        if kind not in makers:
            self.notice = (
                f"the GGUF file's tokenizer is of kind {shortened(repr(kind), 40)}, which is not "
                f"read: the bundle takes token ids only"
            )
            return None
        parts = makers[kind]()
        if parts is None:
            return None
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "post_processor": self._ends(kind),
            **parts,
        }

    def _byte_level(self) -> dict[str, Any] | None:
        name = self._gguf.text("tokenizer.ggml.pre")
        self._split = SPLITS.get(name or "default")
        if self._split is None:
            self.notice = (
                f"texts are cut by the rule {shortened(repr(name), 40)} of the GGUF file's "
                f"tokenizer, which is not known here: the bundle takes token ids only"
            )
            return None
        merges = [merge.split(" ", 1) for merge in self._gguf.texts("tokenizer.ggml.merges")]
        vocabulary = self._vocabulary()
        kept = [
            pair
            for pair in merges
            if len(pair) == 2 and all(x in vocabulary for x in (*pair, "".join(pair)))
        ]
        model = _bpe(vocabulary, kept, ignore_merges=self._split.ignores_merges)
        decoder = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        return {
            "normalizer": self._split.normalizer,
            "pre_tokenizer": self._split.pre_tokenizer,
            "model": model,
            "decoder": decoder,
        }

    def _sentencepiece(self) -> dict[str, Any]:
        vocabulary = self._vocabulary()
        merges = [merge.split(" ", 1) for merge in self._gguf.texts("tokenizer.ggml.merges")]
        if not merges:
            merges = _merges_of_scores(vocabulary, self._list_of("scores", float))
        unknown = self._ids["unk"]
        name = self.tokens[unknown] if unknown is not None and unknown < len(self.tokens) else None
        has_bytes = _BYTE in self._kinds
        model = _bpe(vocabulary, merges, unk_token=name, fuse_unk=True, byte_fallback=has_bytes)
        with_prefix = self._gguf.flag("tokenizer.ggml.add_space_prefix") is not False
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        prefix = [{"type": "Prepend", "prepend": _SPACE}] if with_prefix else []
        back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if with_prefix else []
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
            "pre_tokenizer": None,
            "model": model,
            "decoder": {
                "type": "Sequence",
                "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
            },
        }

    def _unigram(self) -> dict[str, Any]:
        scores = self._list_of("scores", float) or [0.0] * len(self.tokens)
        unknown = self._ids["unk"]
        metaspace = {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "always",
            "split": True,
        }
        return {
            "normalizer": _normalizer(bytes(self._list_of_bytes())),
            "pre_tokenizer": metaspace,
            "model": {
                "type": "Unigram",
                "unk_id": unknown,
                "vocab": [list(pair) for pair in zip(self.tokens, scores, strict=True)],
                "byte_fallback": _BYTE in self._kinds,
            },
            "decoder": metaspace,
        }

    def _list_of_bytes(self) -> list[int]:
        """Return the table of characters that a unigram model replaces; empty for none."""
        found = self._gguf.numbers("tokenizer.ggml.precompiled_charsmap")
        return [int(item) & 0xFF for item in found]

    def _vocabulary(self) -> dict[str, int]:
        """Return token → id; of equal ones the first, and no places that were filled up."""
        found: dict[str, int] = {}
        for index, (token, kind) in enumerate(zip(self.tokens, self._kinds, strict=True)):
            if kind != _UNUSED:
                found.setdefault(token, index)
        return found

    def _added(self) -> list[dict[str, Any]]:
        """Return the tokens that are found in a text before it is cut."""
        roles = {index for role, index in self._ids.items() if role != "unk"}
        # Runs of spaces are found in the escaped text, as sentencepiece does.
        is_escaped = self._gguf.flag("tokenizer.ggml.add_space_prefix") is False
        return [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": is_escaped and kind == _USER_DEFINED,
                "special": kind != _USER_DEFINED,
            }
            for index, (token, kind) in enumerate(zip(self.tokens, self._kinds, strict=True))
            if token and (kind in (_CONTROL, _USER_DEFINED) or index in roles)
        ]

    def _ends(self, kind: str) -> dict[str, Any] | None:
        """Return the tokens that are put around a text."""
        add = {
            "bos": kind == "llama" or (self._split is not None and self._split.adds_bos),
            "eos": kind == "t5",
        }
        put = {}
        for role, default in add.items():
            asked = self._gguf.flag(f"tokenizer.ggml.add_{role}_token")
            index = self._ids[role]
            if (
                (default if asked is None else asked)
                and index is not None
                and index < len(self.tokens)
            ):
                put[role] = self.tokens[index]
        if not put:
            return None
        before = [{"SpecialToken": {"id": put["bos"], "type_id": 0}}] if "bos" in put else []
        after = [{"SpecialToken": {"id": put["eos"], "type_id": 0}}] if "eos" in put else []
        second = [
            {"SpecialToken": {**item["SpecialToken"], "type_id": 1}} for item in (*before, *after)
        ]
        return {
            "type": "TemplateProcessing",
            "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
            "pair": [
                *before,
                {"Sequence": {"id": "A", "type_id": 0}},
                *after,
                *second[: len(before)],
                {"Sequence": {"id": "B", "type_id": 1}},
                *second[len(before) :],
            ],
            "special_tokens": {
                token: {"id": token, "ids": [self._ids[role]], "tokens": [token]}
                for role, token in put.items()
            },
        }

    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        for role, index in self._ids.items():
            if index is not None and 0 <= index < len(self.tokens):
                found[f"{role}_token"] = self.tokens[index]
        length = self._gguf.integer("context_length")
        return found | ({"model_max_length": length} if length else {})


def _normalizer(table: bytes) -> dict[str, Any]:
    """Return what sentencepiece does to a text before it is cut: runs of spaces become one."""
    replaced = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    strip = {"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    parts = [*([replaced] if table else []), strip, spaces]
    return {"type": "Sequence", "normalizers": parts}


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
        **changes,
    }


def _merges_of_scores(vocabulary: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Return the pairs of tokens that make a token, best first.

    A token of a higher score is made first, of equal scores the one with the lower id. Of the pairs
    that make one token those come first whose own parts have lower ids.
    """
    pairs = []
    for token, index in vocabulary.items():
        score = scores[index] if scores else -float(index)
        for cut in range(1, len(token)):
            left = vocabulary.get(token[:cut])
            right = vocabulary.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((-score, index, left, right, cut, token))
    pairs.sort()
    return [[token[:cut], token[cut:]] for *_, cut, token in pairs]
