"""Text files of any length as one stream of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import InputError
from lminf_export.runtime.text import TextCodec

MIN_TOKENS = 2
# A longer text is tokenized in pieces that end at line ends, so that memory stays bounded.
PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class TokenStream:
    """Token ids and their origin.

    Attributes:
        ids: (T,) int64; the start tokens first, if the tokenizer puts any.
        num_start_tokens: how many of them the tokenizer put first.
        names: the files' names, without their folders.
        sha256: of the files' bytes, one after the other.
        text_tokens: tokens of one reading of the text; fewer than T where it is repeated.
    """

    ids: NDArray[np.int64]
    num_start_tokens: int
    names: tuple[str, ...]
    sha256: str
    text_tokens: int


def read_stream(
    codec: TextCodec,
    files: Sequence[str | Path],
    *,
    max_tokens: int | None = None,
    repeat: bool = False,
    start_tokens: bool = True,
) -> TokenStream:
    """Tokenize files, one after the other, behind the tokens the tokenizer puts first.

    Args:
        codec: the bundle's tokenizer.
        files: UTF-8 texts.
        max_tokens: where to stop; the end of the text by default.
        repeat: read the text again and again until max_tokens.
        start_tokens: whether the tokenizer's start tokens come first.

    Raises:
        InputError: a file cannot be read, is not UTF-8, or there are fewer than two tokens.
    """
    if repeat and max_tokens is None:
        raise InputError("a repeated text has no end of its own: give the number of tokens, too")
    if max_tokens is not None and max_tokens < MIN_TOKENS:
        raise InputError(f"max_tokens={max_tokens}: must be at least {MIN_TOKENS}")
    digest = hashlib.sha256()
    texts = [_read(Path(file), digest) for file in files]
    first = special_prefix(codec) if start_tokens else []
    room = None if max_tokens is None else max_tokens - len(first)
    ids = list(islice(_encode(codec, texts), room))
    if len(first) + len(ids) < MIN_TOKENS:
        raise InputError(
            f"{', '.join(str(f) for f in files)}: {len(ids)} tokens; an evaluation needs a text "
            f"of at least {MIN_TOKENS}"
        )
    count = len(ids)
    if repeat and room is not None and ids:
        ids = (ids * -(-room // count))[:room]
    return TokenStream(
        ids=np.array([*first, *ids], np.int64),
        num_start_tokens=len(first),
        names=tuple(Path(file).name for file in files),
        sha256=digest.hexdigest(),
        text_tokens=count,
    )


def special_prefix(codec: TextCodec) -> list[int]:
    """Return the ids a tokenizer puts before every text, usually a start token or nothing."""
    probe = "a"
    plain = codec.encode(probe, add_special_tokens=False)
    full = codec.encode(probe)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _read(path: Path, digest: hashlib._Hash) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not raw:
        raise InputError(f"{path} is empty; give a text of at least {MIN_TOKENS} tokens")
    digest.update(len(raw).to_bytes(8, "little") + raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it, for example "
            "with iconv"
        ) from None


def _encode(codec: TextCodec, texts: Sequence[str]) -> Iterator[int]:
    """Yield the ids of texts, each tokenized as if in one piece."""
    for text in texts:
        for piece, is_behind_a_line in _pieces(text):
            yield from _behind_a_line(codec, piece) if is_behind_a_line else codec.ids(piece)


def _behind_a_line(codec: TextCodec, piece: str) -> list[int]:
    """Return a piece's ids without the space that some tokenizers begin every text with."""
    line_end, ids = codec.ids("\n"), codec.ids("\n" + piece)
    count = len(line_end)
    return ids[count:] if count and ids[:count] == line_end else codec.ids(piece)


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a text behind line ends, into pieces of about PIECE_CHARACTERS.

    Yields each piece, and whether a line ended before it.
    """
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        if end <= start or len(text) - start <= PIECE_CHARACTERS:
            end = min(start + PIECE_CHARACTERS, len(text))
        yield text[start:end], text[start - 1 : start] == "\n"
        start = end
