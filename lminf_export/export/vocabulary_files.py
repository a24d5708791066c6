"""Vocabularies that come as a file of another library, as tokenizers of the library `tokenizers`.

SentencePiece keeps pieces, scores and how it normalises text in one protobuf; tiktoken keeps ranks
of byte strings. transformers converts both, but not every setting of a SentencePiece file, so more
than one conversion is tried, and each is compared with the library that the file is of.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lminf_export.checkpoint.source import TIKTOKEN_PATTERN
from lminf_export.errors import ModelError
from lminf_export.models.internals import Internals
from lminf_export.runtime.foreign_errors import foreign_errors

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TIKTOKEN_FILES = ("tokenizer.model", "tiktoken.model")
_INTERNALS = Internals("vocabularies of SentencePiece and tiktoken")
_CACHE = "TIKTOKEN_CACHE_DIR"
_SPACE = "▁"
# Types of pieces in SentencePiece's protobuf, and of its models.
_CONTROL, _USER_DEFINED = 3, 4
_UNIGRAM, _BPE = 1, 2
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before ranks are looked up, which a tiktoken file does not say: Qwen cuts numbers
# into digits, Llama 3 and the others by three.
_QWEN, _LLAMA3 = _WORDS % "", _WORDS % "{1,3}"
_QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
)


@dataclass(frozen=True)
class VocabularyFile:
    """A file of SentencePiece or tiktoken.

    Attributes:
        path: the file.
        library: whose it is: "sentencepiece" or "tiktoken".
    """

    path: Path
    library: str

    @property
    def missing(self) -> list[str]:
        """Packages that converting it takes and that are not installed."""
        modules = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
        if self.library == "tiktoken":
            modules = {"tiktoken": "tiktoken"}
        return [package for module, package in modules.items() if not _is_installed(module)]

    def candidates(self) -> Iterator[Tokenizer]:
        """Yield conversions of it, the likeliest first.

        Raises:
            ModelError: the file is damaged, or of a kind that is not converted.
        """
        with foreign_errors(ModelError, f"{self.path.name} cannot be converted"):
            if self.library == "tiktoken":
                yield self._of_ranks()
            else:
                for prepends in (True, False):
                    yield _of_pieces(self.path, prepends=prepends)

    def reader(self) -> Callable[[str], list[int]]:
        """Return how the library itself reads a text, without special tokens.

        Raises:
            ModelError: the file is damaged.
        """
        with foreign_errors(ModelError, f"{self.path.name} is damaged"):
            if self.library == "sentencepiece":
                import sentencepiece

                processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
                return lambda text: list(processor.encode(text))
            import tiktoken

            encoding = tiktoken.Encoding(
                self.path.name,
                pat_str=self._pattern,
                mergeable_ranks=_ranks(self.path),
                special_tokens={},
            )
            return lambda text: list(encoding.encode(text, disallowed_special=()))

    @property
    def cut_as(self) -> str:
        """Whose rule cuts text into words before a file of tiktoken is looked into."""
        return "Qwen" if self.path.name.startswith("qwen") else "Llama 3"

    @property
    def _pattern(self) -> str:
        return {"Qwen": _QWEN, "Llama 3": _LLAMA3}[self.cut_as]

    def _of_ranks(self) -> Tokenizer:
        converter = _INTERNALS.lookup("convert_slow_tokenizer.TikTokenConverter")
        special = list(_QWEN_TOKENS) if self.cut_as == "Qwen" else []
        with uncached():
            made: Tokenizer = converter(
                vocab_file=str(self.path), pattern=self._pattern, extra_special_tokens=special
            ).converted()
        return made


@contextmanager
def uncached() -> Iterator[None]:
    """Let tiktoken read files anew: it keeps them by their path, also where they have changed."""
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before


def find_vocabulary(folder: Path) -> VocabularyFile | None:
    """Return a model's file of SentencePiece or tiktoken, None if it has neither."""
    for path in (*(folder / name for name in TIKTOKEN_FILES), *folder.glob(TIKTOKEN_PATTERN)):
        if path.is_file() and _is_tiktoken(path):
            return VocabularyFile(path, "tiktoken")
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return VocabularyFile(folder / name, "sentencepiece")
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing, or it is blocked
        return False


def _is_tiktoken(path: Path) -> bool:
    """Whether a file's first line is a byte string in base 64 and its rank."""
    with open(path, "rb") as file:
        parts = file.readline(4096).split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], b"+/"))
    except binascii.Error:
        return False


def _ranks(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines() if line.strip())
    return {base64.b64decode(text): int(rank) for text, rank in lines}


def _of_pieces(path: Path, *, prepends: bool) -> Tokenizer:
    """Convert a SentencePiece file.

    Args:
        path: the file.
        prepends: the space in front of a text comes before every piece of it that stands between
            added tokens, and beside a space that is there; otherwise before the first alone, and
            in place of one.
    """
    formats: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = formats.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trained, normal = proto.trainer_spec, proto.normalizer_spec
    if trained.treat_whitespace_as_suffix:
        raise ModelError("it marks words at their end, which no conversion has")
    tokenizer = Tokenizer(_model(proto))
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    steps: list[Any] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(x), y) for x, y in ((r"\A +| +\z", ""), (" {2,}", " "))]
    if normal.add_dummy_prefix and prepends:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if normal.add_dummy_prefix and not prepends:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    written: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normal.add_dummy_prefix:
        written.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(written)
    return tokenizer


def _model(proto: Any) -> Any:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    trained = proto.trainer_spec
    if trained.model_type == _UNIGRAM:
        return models.Unigram(pieces, trained.unk_id, trained.byte_fallback)
    if trained.model_type != _BPE:
        raise ModelError("it is a model of words or characters")
    merges = _INTERNALS.lookup("convert_slow_tokenizer.generate_merges")
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    return models.BPE(
        vocabulary,
        merges(vocabulary, dict(pieces)),
        unk_token=trained.unk_piece,
        fuse_unk=True,
        byte_fallback=trained.byte_fallback,
    )
