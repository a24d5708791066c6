"""Prompts to token ids, token ids to a stream of text, and stop strings."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lminf_export.bundle.folder import Bundle
from lminf_export.disk import require_path
from lminf_export.errors import BundleError, InputError, require_instance, shown
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.added_tokens import SIDE_FILES, SURROGATE, merge_added_tokens
from lminf_export.runtime.foreign_errors import foreign_errors
from lminf_export.runtime.inputs import one_by_one
from lminf_export.runtime.text_stream import StreamDecoder

logger = logging.getLogger(__name__)

_MOST_STOPS = 4096
# Characters of a text that is long.
_LONG = 8192
_long_text = threading.Lock()


def read_tokenizer(path: Path) -> Tokenizer:
    """Read `tokenizer.json` alone; the tokenizer neither cuts nor fills a text.

    Raises:
        BundleError: it is no tokenizer.
    """
    require_path("path", path, BundleError)
    with foreign_errors(BundleError, f"{path} cannot be read as a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
    # Whoever trained with them saved them; a prompt and a text are to be read whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextCodec:
    """A bundle's tokenizer, with the added tokens that the files beside it name.

    Args:
        path: `tokenizer.json`.
        beside: which of the files beside it may be read.

    Attributes:
        tokenizer: of the library `tokenizers`; neither cuts nor fills a text.
        problems: what is wrong with the files beside it, one line each; also logged.

    Raises:
        BundleError: it is no tokenizer.
    """

    def __init__(self, path: Path, *, beside: Iterable[str] = SIDE_FILES) -> None:
        self.tokenizer = read_tokenizer(path)
        self.problems = merge_added_tokens(self.tokenizer, path.parent, beside)
        for problem in self.problems:
            logger.warning(problem)

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
        listed = bundle.manifest.files
        return cls(bundle.tokenizer_path, beside=[name for name in SIDE_FILES if name in listed])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a prompt's token ids.

        Raises:
            InputError: for an empty prompt, or one that is no Unicode text.
        """
        _require_text(text, "the prompt")
        if not text:
            raise InputError("the prompt is empty; give at least one character")
        if SURROGATE.search(text):
            raise InputError("the prompt is not UTF-8; convert it, for example with iconv")
        token_ids = self.ids(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InputError(f"the prompt {shown(text)} holds nothing the tokenizer knows")
        return token_ids

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a piece of text, none for one that holds none.

        Raises:
            InputError: the tokenizer cannot read it.
        """
        _require_text(text, "the text")
        with foreign_errors(InputError, "the tokenizer cannot read this text"):
            if len(text) < _LONG:
                return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            # A batch is encoded without Python's lock, so that other threads go on. One at a time:
            # a long text takes some hundred times its bytes meanwhile.
            with _long_text:
                encoded = self.tokenizer.encode_batch_fast(
                    [text], add_special_tokens=add_special_tokens
                )
                return encoded[0].ids

    def ids_behind(self, text: str, before: str = "x") -> list[int]:
        """Return the token ids of a text that stands behind another one, and not at a beginning.

        Some tokenizers put a space before a text that begins.

        Args:
            text: to be read.
            before: the end of what stands before it. Where both would share a token, the text
                gets tokens of its own.

        Raises:
            InputError: no text, or the tokenizer cannot read it.
        """
        _require_text(text, "the text")
        _require_text(before, "the text before")
        first, both = self.ids(before), self.ids(before + text)
        return both[len(first) :] if both[: len(first)] == first else self.ids(text)

    def is_special(self, token: int) -> bool:
        """Whether a token is a special one, which is no text.

        Raises:
            InputError: it is no token id.
        """
        number = as_integer("token", token, 0, InputError)
        found = self.tokenizer.get_added_tokens_decoder().get(number)
        return found is not None and bool(found.special)

    def stream(
        self,
        token_ids: Iterable[int],
        *,
        after: Sequence[int] = (),
        stop: Sequence[str] = (),
        begins_open: bool = False,
        ends_open: bool = False,
    ) -> Iterator[str]:
        """Turn ids into pieces of text as they arrive; end at a stop string.

        Args:
            token_ids: yielded by a model.
            after: ids of the text before, such as the prompt's.
            stop: strings that end the text, or one; no part of them is yielded, and no further
                token is requested once one is complete.
            begins_open: show what a stream before left open with `ends_open`.
            ends_open: leave a character that is not complete at the end to a stream that
                follows, `after` the ids of this one.

        Raises:
            InputError: an empty stop string, or arguments of another type; a token that is none,
                when it comes.
        """
        tokens = one_by_one(token_ids, "token_ids")
        text = StreamText(self, after, stop, begins_open=begins_open)
        return self._pieces(tokens, text, ends_open)

    @staticmethod
    def _pieces(token_ids: Iterable[int], text: StreamText, ends_open: bool) -> Iterator[str]:
        for token in token_ids:
            if piece := text.push(token):
                yield piece
            if text.found is not None:
                return
        if piece := text.finish(ends_open=ends_open):
            yield piece


class StreamText:
    """Turns tokens into pieces of text; no part of a stop string is ever returned.

    Args:
        codec: the bundle's tokenizer.
        after: ids of the text before, such as the prompt's.
        stop: strings that end the text.
        begins_open: see `TextCodec.stream`.

    Raises:
        InputError: an argument of another kind, or an empty stop string.
    """

    def __init__(
        self,
        codec: TextCodec,
        after: Sequence[int],
        stop: Sequence[str] = (),
        *,
        begins_open: bool = False,
    ) -> None:
        require_instance("codec", codec, TextCodec)
        self._decoder = StreamDecoder(codec.tokenizer, after, begins_open)
        self._stops = StopStrings(stop)

    @property
    def found(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """Add a token; return the text that has become certain."""
        return self._stops.push(self._decoder.step(token_id))

    def finish(self, *, ends_open: bool = False) -> str:
        """Return the text held back; no more tokens follow.

        Args:
            ends_open: see `TextCodec.stream`.
        """
        rest = "" if ends_open else self._decoder.flush()
        return self._stops.push(rest) + self._stops.flush()


class StopText:
    """`Request.ends_at` for stop strings: the engine reads no token behind one.

    Args:
        codec: the bundle's tokenizer.
        after: ids of the text before, such as the prompt's.
        stop: strings that end the text, at least one.
    """

    def __init__(self, codec: TextCodec, after: Sequence[int], stop: Sequence[str]) -> None:
        self._text = StreamText(codec, after, stop)

    def __call__(self, token_id: int) -> bool:
        """Add a token; tell whether a stop string is complete."""
        self._text.push(token_id)
        return self._text.found is not None


class StopStrings:
    """Passes text on until a stop string is complete; holds back what could begin one.

    Args:
        stop: strings that end the text, or one.

    Attributes:
        strings: the stop strings.
        found: the stop string that ended the text, or None.

    Raises:
        InputError: an empty string, or no strings.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        if isinstance(stop, str):
            stop = (stop,)
        self.strings = tuple(itertools.islice(one_by_one(stop, "stop"), _MOST_STOPS + 1))
        if len(self.strings) > _MOST_STOPS:
            raise InputError(f"more than {_MOST_STOPS} stop strings")
        for text in self.strings:
            _require_text(text, "a stop string")
            if not text:
                raise InputError("a stop string is empty; give at least one character")
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; return the text that no stop string can contain.

        Raises:
            InputError: it is no text.
        """
        _require_text(text, "the text")
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(place, s) for s in self.strings if (place := text.find(s)) >= 0]
        if places:
            place, self.found = min(places)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, s) for s in self.strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back so far; no more ids follow."""
        held, self._held = self._held, ""
        return held


def _require_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}; expected text (a str)")


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
