"""A batch of prompts, continued side by side: `LanguageModel.generate_batch`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from lminf_export.errors import InputError
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import FinishReason, Request, Token
from lminf_export.runtime.batching.stream import TokenStream
from lminf_export.runtime.inputs import checked_prompt, one_by_one
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.text import StopStrings, StopText, StreamText

# Continuations of one prompt, and prompts that come from an iterator, which may have no end.
_MOST = 2**16


@dataclass(frozen=True)
class Piece:
    """A token that one continuation has got, or its end.

    Attributes:
        prompt: index of the prompt.
        index: of the continuation, 0 … n − 1.
        token: the token; None at the end.
        text: text that has become certain; "" where the bundle has no tokenizer.
        finish_reason: why it ended; None before the end.
    """

    prompt: int
    index: int
    token: Token | None
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generated:
    """One continuation of one prompt.

    Attributes:
        prompt: index of the prompt.
        index: of the continuation, 0 … n − 1.
        tokens: with their log probabilities, if those were asked for.
        text: their text, without stop strings; None where the bundle has no tokenizer.
        finish_reason: why it ended.
        num_prompt_tokens: tokens of the prompt.
    """

    prompt: int
    index: int
    tokens: tuple[Token, ...]
    text: str | None
    finish_reason: FinishReason
    num_prompt_tokens: int

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens."""
        return [token.id for token in self.tokens]


class Batch:
    """Prompts of any lengths and an engine that continues them; `pieces` runs it, once.

    Args:
        lm: that continues them.
        prompts: token ids or text of each.
        n: continuations of each.
        request: their settings; its prompt stands for nothing.
        stop: strings that end a text.
        slots: continuations side by side at most.

    Raises:
        InputError: see `LanguageModel.generate_batch`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Any,
        *,
        n: int,
        request: Request,
        stop: Sequence[str],
        slots: int,
    ) -> None:
        self._n = as_integer("n", n, 1, InputError, maximum=_MOST)
        self._slots = as_integer("slots", slots, 1, InputError)
        self._lm = lm
        self._codec = lm.codec if lm.bundle.tokenizer_path is not None else None
        self._stop = StopStrings(stop).strings
        if self._stop and self._codec is None:
            raise InputError("stop strings need a tokenizer, this bundle has none")
        self._prompts = _prompts(lm, prompts)
        self._request = request

    @property
    def num_prompt_tokens(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for ids in self._prompts]

    def pieces(self) -> Iterator[Piece]:
        """Yield what every continuation gets, as it gets it.

        Raises:
            LminfError: what ended a continuation early; the others end, too.
        """
        count = len(self._prompts) * self._n
        if not count:
            return
        slots = min(self._slots, count)
        # Whoever takes the pieces may take its time.
        with Engine(self._lm, slots, max_waiting=count, reader_timeout=None) as engine:
            streams = [s for ids in self._prompts for s in self._submit(engine, ids)]
            texts = [self._text(ids) for ids in self._prompts for _ in range(self._n)]
            for place, token in _merged(streams):
                prompt, index = divmod(place, self._n)
                text = texts[place]
                if token is not None:
                    piece = text.push(token.id) if text else ""
                    yield Piece(prompt, index, token, piece)
                else:
                    rest = text.finish() if text else ""
                    yield Piece(prompt, index, None, rest, streams[place].finish_reason)

    def _submit(self, engine: Engine, ids: list[int]) -> list[TokenStream]:
        request = replace(self._request, prompt_ids=ids)
        if not self._stop:
            return engine.submit_many(request, self._n)
        assert self._codec is not None
        watches = [StopText(self._codec, ids, self._stop) for _ in range(self._n)]
        return engine.submit_many(request, self._n, ends_at=watches)

    def _text(self, ids: list[int]) -> StreamText | None:
        return StreamText(self._codec, ids, self._stop) if self._codec else None

    def collected(self) -> list[Generated]:
        """Return all continuations when they have ended, in the order of the prompts."""
        tokens: dict[tuple[int, int], list[Token]] = {}
        texts: dict[tuple[int, int], list[str]] = {}
        reasons: dict[tuple[int, int], FinishReason] = {}
        for piece in self.pieces():
            key = piece.prompt, piece.index
            texts.setdefault(key, []).append(piece.text)
            if piece.token is not None:
                tokens.setdefault(key, []).append(piece.token)
            if piece.finish_reason is not None:
                reasons[key] = piece.finish_reason
        return [
            Generated(
                *(prompt, index),
                tokens=tuple(tokens.get((prompt, index), ())),
                text="".join(texts[prompt, index]) if self._codec else None,
                finish_reason=reasons[prompt, index],
                num_prompt_tokens=len(ids),
            )
            for prompt, ids in enumerate(self._prompts)
            for index in range(self._n)
        ]


def _prompts(lm: LanguageModel, prompts: Any) -> list[list[int]]:
    if isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__iter__"):
        raise InputError("prompts: expected a list of texts or of lists of token ids")
    found: list[list[int]] = []
    for prompt in one_by_one(prompts, "prompts"):
        if len(found) == _MOST and not isinstance(prompts, Sized):
            raise InputError(f"prompts: more than {_MOST}, or no end of them; give a list")
        if isinstance(prompt, str):
            found.append(lm.codec.encode(prompt))
        else:
            found.append(checked_prompt(prompt, lm.vocab_size)[0].tolist())
    return found


def _merged(streams: list[TokenStream]) -> Iterator[tuple[int, Token | None]]:
    """Yield the tokens of several streams as they come, by place, and None at the end of each."""
    ready: SimpleQueue[int] = SimpleQueue()
    for place in range(len(streams)):
        ready.put(place)
    left = len(streams)
    while left:
        place = ready.get()
        stream = streams[place]
        ended = stream.finished_at is not None
        yield from ((place, token) for token in stream.take())
        if ended:
            if stream.error is not None:
                raise stream.error
            left -= 1
            yield place, None
        elif not stream.when_ready(partial(ready.put, place)):
            ready.put(place)
