"""The bytes of one token, for lists of tokens beside a text."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer

from lminf_export.errors import BundleError
from lminf_export.runtime.foreign_errors import foreign_errors
from lminf_export.runtime.text_stream import byte_kind, fallback_byte, level_bytes

_REMEMBERED = 65536


class TokenBytes:
    """Bytes of a tokenizer's tokens, special ones included.

    Args:
        tokenizer: whose tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kind = byte_kind(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self._of = functools.lru_cache(_REMEMBERED)(self._found)

    def of(self, token: int) -> bytes:
        """Return a token's bytes as they stand within a text; b"" for an unknown id."""
        return self._of(token)

    def _found(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode("utf-8")
        string = self._tokenizer.id_to_token(token)
        if string is None:
            return b""
        if self._kind == "level":
            return level_bytes(string)
        value = fallback_byte(string) if self._kind == "fallback" else None
        if value is not None:
            return bytes((value,))
        decoder = self._tokenizer.decoder
        if decoder is None:
            return string.encode("utf-8")
        # Behind itself it has the spaces that a decoder takes from a text's beginning.
        with foreign_errors(BundleError, "the tokenizer cannot decode its own tokens"):
            once, twice = decoder.decode([string]), decoder.decode([string, string])
        return twice[len(once) :].encode("utf-8") if twice.startswith(once) else once.encode()
