"""Prompts to token ids, token ids to a stream of text, and stop strings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import BundleError, InputError
from lminf_export.runtime.text_stream import StreamDecoder

# How Python passes on bytes of the command line that are no text.
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextCodec:
    """A bundle's tokenizer.

    Args:
        path: `tokenizer.json`.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise BundleError(f"{path} cannot be read as a tokenizer: {error}") from None
        # Whoever trained with them saved them; a prompt and a text are to be read whole.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    @classmethod
    def of(cls, bundle: Bundle) -> TextCodec:
        """Return a bundle's tokenizer.

        Raises:
            BundleError: if it has none.
        """
        if bundle.tokenizer_path is None:
            raise BundleError(
                f"{bundle.path} has no tokenizer.json; use the Python interface with token ids"
            )
        return cls(bundle.tokenizer_path)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a prompt's token ids.

        Raises:
            InputError: for an empty prompt, or one that is no Unicode text.
        """
        if not text:
            raise InputError("the prompt is empty; give at least one character")
        if _SURROGATE.search(text):
            raise InputError("the prompt is not UTF-8; convert it, for example with iconv")
        token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not token_ids:
            raise InputError(f"the prompt {text!r} holds nothing the tokenizer knows")
        return list(token_ids)

    def stream(
        self, token_ids: Iterable[int], *, after: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Turn ids into pieces of text as they arrive; end at a stop string.

        Args:
            token_ids: yielded by a model.
            after: ids of the text before, such as the prompt's.
            stop: strings that end the text; no part of them is yielded, and no further token is
                requested once one is complete.
        """
        decoder = StreamDecoder(self.tokenizer, after)
        stops = StopStrings(stop)
        for token in token_ids:
            piece = stops.push(decoder.step(token))
            if piece:
                yield piece
            if stops.found:
                return
        piece = stops.push(decoder.flush()) + stops.flush()
        if piece:
            yield piece


class StopStrings:
    """Passes text on until a stop string is complete; holds back what could begin one.

    Attributes:
        found: the stop string that ended the text, or None.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if any(not text for text in stop):
            raise InputError("a stop string is empty; give at least one character")
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; return the text that no stop string can contain."""
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(place, s) for s in self._stop if (place := text.find(s)) >= 0]
        if places:
            place, self.found = min(places)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back so far; no more ids follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
