"""Text of a stream of tokens: pieces as they become certain, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from lminf_export.errors import require_instance
from lminf_export.runtime.text import StopStrings, TextCodec
from lminf_export.runtime.text_stream import StreamDecoder


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
