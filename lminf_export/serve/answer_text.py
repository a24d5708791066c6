"""One choice of an answer: tokens to text, stop strings left out, log probabilities beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lminf_export.runtime.batching.request import Token
from lminf_export.runtime.text import StopStrings, TextCodec
from lminf_export.runtime.text_stream import StreamDecoder


@dataclass(frozen=True)
class Placed:
    """A token and where its text begins in the answer, in characters."""

    token: Token
    offset: int


@dataclass
class Piece:
    """Text that has become certain, and the tokens that it ends, if they are wanted."""

    text: str = ""
    tokens: list[Placed] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class AnswerText:
    """Turns the tokens of one choice into text as `TextCodec.stream` does.

    Args:
        codec: the model's.
        after: ids of the text before, such as the prompt's.
        stop: strings that end the text.
        with_tokens: return the tokens, too, each with the text that it begins in.
    """

    def __init__(
        self, codec: TextCodec, after: Sequence[int], stop: Sequence[str], with_tokens: bool
    ) -> None:
        self._decoder = StreamDecoder(codec.tokenizer, after)
        self._stops = StopStrings(stop)
        self._waiting: deque[Placed] | None = deque() if with_tokens else None
        self._decoded = 0
        self._shown = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.found is not None

    def push(self, tokens: Iterable[Token]) -> Piece:
        """Add tokens; return the text that is certain."""
        if self._waiting is None:
            decoded = self._decoder.steps(token.id for token in tokens)
            return Piece(self._stops.push(decoded))
        shown = ""
        for token in tokens:
            if self.stopped:
                break
            self._waiting.append(Placed(token, self._decoded))
            decoded = self._decoder.step(token.id)
            self._decoded += len(decoded)
            shown += self._stops.push(decoded)
        self._shown += len(shown)
        return Piece(shown, self._begun(self._shown))

    def finish(self) -> Piece:
        """Return what was held back; no more tokens follow."""
        shown = self._stops.push(self._decoder.flush()) + self._stops.flush()
        self._shown += len(shown)
        # Of tokens at a stop string those belong to the answer whose text begins before it.
        return Piece(shown, self._begun(self._shown if self.stopped else self._decoded + 1))

    def _begun(self, end: int) -> list[Placed]:
        """Take the tokens whose text begins before a place."""
        found = []
        while self._waiting and self._waiting[0].offset < end:
            found.append(self._waiting.popleft())
        return found
