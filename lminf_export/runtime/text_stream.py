"""Tokens to text one at a time: the joined pieces are the decoded whole, without its prompt."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

from tokenizers import Tokenizer

from lminf_export.errors import BundleError, InputError
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.foreign_errors import foreign_errors
from lminf_export.runtime.inputs import listed_ids

# Visible tokens of the prompt that a stream begins behind, at least.
_CONTEXT_TOKENS = 8
# Groups that are remembered at most; more than a few only if most have no text.
_MAX_GROUPS = 16
_REPLACEMENT = "\ufffd"

# How a tokenizer writes the bytes of a character: it does not, as tokens such as <0xE6>, or each
# as a character.
ByteKind = Literal["none", "fallback", "level"]
# Ids that a tokenizer can have.
_MOST_TOKENS = 2**32


class StreamDecoder:
    """Decodes one token at a time; every character comes whole, with the token that ends it.

    The tokenizer's own decoder sees a short context and the new tokens, so spaces and joins are
    its own. It never sees part of a character: bytes wait until their character is complete, or
    until it is certain that they are none.

    Args:
        tokenizer: whose ids are decoded; special tokens are no text.
        after: ids of the text before, such as the prompt's; none of its text is returned.
        begins_open: whether a character that breaks off at its end is returned after all.
    """

    def __init__(
        self, tokenizer: Tokenizer, after: Sequence[int] = (), begins_open: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._bytes = _byte_groups(tokenizer)
        self._groups: list[list[str]] = []
        self._text = ""
        for token in self._end_of(listed_ids(after, "after", _MOST_TOKENS)):
            self._show(self._bytes.push(token))
        if not begins_open:
            # A character that breaks off at the prompt's end belongs to it, if it stays broken.
            self._text = self._decoded([*self._groups, self._bytes.broken()])
        self._first_alone = bool(self._bytes.broken())

    def step(self, token: int) -> str:
        """Return the text that has become certain, often "" or one word."""
        string = self._visible(token)
        return "" if string is None else self._show(self._bytes.push(string))

    def steps(self, tokens: Iterable[int]) -> str:
        """Return the text that has become certain with several tokens; quicker than each alone."""
        strings = (self._visible(token) for token in tokens)
        pushed = [self._bytes.push(string) for string in strings if string is not None]
        groups = [group for group in pushed if group]
        # Of a character that the prompt broke off, its end alone tells what is text behind it.
        split = int(self._first_alone)
        parts = (groups[:split], groups[split:])
        return "".join([self._show(list(chain.from_iterable(part))) for part in parts])

    def flush(self) -> str:
        """Return the text held back, with a replacement character for invalid bytes."""
        group = self._bytes.broken()
        self._bytes = _byte_groups(self._tokenizer)
        return self._show(group)

    def _visible(self, token: int) -> str | None:
        """Return a token's string; None if it is special or unknown, and so no text."""
        number = as_integer("token id", token, 0, InputError, maximum=_MOST_TOKENS - 1)
        string = self._tokenizer.id_to_token(number)
        return None if string in self._special else string

    def _end_of(self, ids: Sequence[int]) -> list[str]:
        """Return the last visible tokens of a text, from one that begins with a character."""
        found: list[str] = []
        for token in reversed(ids):
            string = self._visible(token)
            if string is None:
                continue
            found.append(string)
            if len(found) >= _CONTEXT_TOKENS and self._bytes.begins_character(string):
                break
        return found[::-1]

    def _show(self, group: list[str]) -> str:
        """Return the text that a group of token strings adds, and remember the context."""
        if not group:
            return ""
        self._first_alone = False
        groups = [*self._groups, group]
        text = self._decoded(groups)
        piece = text_behind(self._text, text)
        for start in range(len(groups) - 1, -1, -1):
            # Only a first token that is text itself has had all that decoders do to a beginning.
            if context := self._decoded(groups[start:]):
                break
        kept = groups[start:]
        if len(kept) > _MAX_GROUPS:
            kept = [kept[0], *kept[1 - _MAX_GROUPS :]]
            context = self._decoded(kept)
        self._groups, self._text = kept, context
        return piece

    def _decoded(self, groups: list[list[str]]) -> str:
        strings = [string for group in groups for string in group]
        decoder = self._tokenizer.decoder
        if decoder is None or not strings:
            return " ".join(strings)
        with foreign_errors(BundleError, "the tokenizer cannot decode its own tokens"):
            return decoder.decode(strings)


def text_behind(before: str, text: str) -> str:
    """Return what stands in a text behind the beginning it shares with another one."""
    if text.startswith(before):
        return text[len(before) :]
    pairs = enumerate(zip(before, text, strict=False))
    return text[next((place for place, (a, b) in pairs if a != b), len(text)) :]


class _NoBytes:
    """Groups of a tokenizer whose tokens are all whole characters."""

    def push(self, string: str) -> list[str]:
        """Add a token; return the token strings, as the decoder takes them, that are complete."""
        return [string]

    def broken(self) -> list[str]:
        """Return, for the decoder, what waits for the rest of a character."""
        return []

    def begins_character(self, string: str) -> bool:
        """Tell whether a token begins with the beginning of a character."""
        return True


class _FallbackBytes(_NoBytes):
    """Groups of a tokenizer with tokens such as <0xE6> for the bytes of rare characters.

    Its decoder takes a whole run of bytes for invalid if one of them is. What has been shown
    cannot be taken back: here complete characters stand, and each other byte is replaced.
    """

    def __init__(self) -> None:
        self._pending = b""

    def push(self, string: str) -> list[str]:
        value = fallback_byte(string)
        if value is None:
            group = [*self.broken(), string]
            self._pending = b""
            return group
        joined = self._pending + bytes((value,))
        self._pending = _incomplete_end(joined)
        shown = joined[: len(joined) - len(self._pending)]
        try:
            shown.decode("utf-8")
        except UnicodeDecodeError:
            valid = shown[-1:] if value < 0x80 else b""
            return [_REPLACEMENT] * (len(shown) - len(valid)) + _fallback_tokens(valid)
        return _fallback_tokens(shown)

    def broken(self) -> list[str]:
        return [_REPLACEMENT] * len(self._pending)

    def begins_character(self, string: str) -> bool:
        value = fallback_byte(string)
        return value is None or not _continues(value)


class _LevelBytes(_NoBytes):
    """Groups of a byte-level tokenizer, each character of whose tokens stands for a byte."""

    def __init__(self) -> None:
        self._pending = b""

    def push(self, string: str) -> list[str]:
        joined = self._pending + level_bytes(string)
        pending = _incomplete_end(joined)
        whole = not self._pending and not pending
        self._pending = pending
        if whole:
            return [string]
        shown = joined[: len(joined) - len(pending)]
        return [_level_string(shown)] if shown else []

    def broken(self) -> list[str]:
        return [_level_string(self._pending)] if self._pending else []

    def begins_character(self, string: str) -> bool:
        first = level_bytes(string)[:1]
        return bool(first) and not _continues(first[0])


def byte_kind(tokenizer: Tokenizer) -> ByteKind:
    """Find by a trial how a tokenizer's decoder takes bytes."""
    decoder = tokenizer.decoder
    if decoder is None:
        return "none"
    with foreign_errors(BundleError, "the tokenizer's decoder cannot be used"):
        if decoder.decode(["a", "<0xC3>", "<0xA9>"]).endswith("é"):
            return "fallback"
        if decoder.decode(["a", _level_string("é".encode())]).endswith("é"):
            return "level"
    return "none"


def _byte_groups(tokenizer: Tokenizer) -> _NoBytes:
    kinds = {"none": _NoBytes, "fallback": _FallbackBytes, "level": _LevelBytes}
    return kinds[byte_kind(tokenizer)]()


def _incomplete_end(data: bytes) -> bytes:
    """Return the bytes at the end, three at most, that more bytes can make a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def fallback_byte(string: str) -> int | None:
    """Return the byte that a token such as <0xE6> stands for; None for any other."""
    if len(string) != 6 or not (string.startswith("<0x") and string.endswith(">")):
        return None
    try:
        return int(string[3:5], 16)
    except ValueError:
        return None


def _fallback_tokens(data: bytes) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in data]


def _level_alphabet() -> dict[int, str]:
    """Return the character of each byte: printable ones their own, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    numbered = {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printable} | numbered


_LEVEL_CHARACTERS = _level_alphabet()
_LEVEL_BYTES = {character: byte for byte, character in _LEVEL_CHARACTERS.items()}


def level_bytes(string: str) -> bytes:
    """Return the bytes of a byte-level token; a token with another character stands for itself."""
    try:
        return bytes(_LEVEL_BYTES[character] for character in string)
    except KeyError:
        return string.encode("utf-8")


def _level_string(data: bytes) -> str:
    return "".join(_LEVEL_CHARACTERS[byte] for byte in data)
