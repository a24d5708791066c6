"""One request while it is answered: its sequences in an engine, and what is new of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from lminf_export.errors import LminfError
from lminf_export.runtime.batching.request import Request, Token
from lminf_export.runtime.batching.stream import TokenStream
from lminf_export.runtime.text import StopText
from lminf_export.serve.answer_text import AnswerText, Piece
from lminf_export.serve.api_errors import ApiError, of_ours, shutting_down
from lminf_export.serve.generation import Generation
from lminf_export.serve.kept_answer import AnswerKeeper
from lminf_export.serve.metrics import ServerMetrics
from lminf_export.serve.planning import Plan
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.shared_beginnings import SharedBeginning

# Pieces of all choices that wait to be sent; behind them tokens wait in the engine.
_QUEUED_PIECES = 16


@dataclass(frozen=True)
class Update:
    """News of one choice.

    Attributes:
        index: of the choice.
        piece: text and tokens.
        finish_reason: "stop" or "length" with the last one.
    """

    index: int
    piece: Piece
    finish_reason: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt: int
    cached: int
    completion: int

    @property
    def body(self) -> dict[str, object]:
        """The object that a response holds."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(eq=False)
class Choice:
    """One sequence that answers a prompt."""

    index: int
    stream: TokenStream
    text: AnswerText
    keeper: AnswerKeeper | None
    shared: SharedBeginning | None


class Answering:
    """The sequences of one request; closing it gives their slots back.

    Args:
        model: that answers.
        generation: how.
        plans: of the prompts, each of which gets `generation.n` choices.
        keepers: of the state of each prompt's answer, if it has only one; None to keep none.
        metrics: told of times and counts.
        deadline: seconds for the whole answer.
        event_seconds: least time between updates; tokens that come sooner come together.

    Raises:
        InputError, BusyError, SessionError: see `Engine.submit`; then no sequence runs.
    """

    def __init__(
        self,
        model: ServedModel,
        generation: Generation,
        plans: list[Plan],
        keepers: list[AnswerKeeper | None],
        metrics: ServerMetrics,
        deadline: float,
        event_seconds: float = 0.0,
    ) -> None:
        self.model = model
        self.generation = generation
        self._metrics = metrics
        self._plans = plans
        self._deadline = deadline
        self._event_seconds = event_seconds
        self.choices: list[Choice] = []
        try:
            for plan, keeper in zip(plans, keepers, strict=True):
                self._submit(plan, keeper)
        except LminfError:
            self.close()
            raise
        for plan in plans:
            metrics.reused(model.name, plan.num_cached)

    @property
    def num_cached(self) -> int:
        """Tokens of the prompts that were not read again."""
        return sum(plan.num_cached for plan in self._plans)

    @property
    def is_follow_up(self) -> bool:
        """Whether it goes on a conversation."""
        return any(plan.is_follow_up for plan in self._plans)

    def usage(self) -> Usage:
        """Return the tokens so far."""
        return Usage(
            sum(plan.num_prompt_tokens for plan in self._plans),
            self.num_cached,
            sum(choice.stream.num_tokens for choice in self.choices),
        )

    def close(self) -> None:
        """End what still runs."""
        for choice in self.choices:
            choice.stream.cancel()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield what is new, of all choices as it comes.

        Raises:
            ApiError: an answer was cut short.
        """
        if len(self.choices) == 1:
            async for update in self._of_choice(self.choices[0]):
                yield update
            return
        # Updates, and each task when it has ended.
        queue: asyncio.Queue[Update | asyncio.Task[None]] = asyncio.Queue()
        room = asyncio.Semaphore(_QUEUED_PIECES)

        async def fill(choice: Choice) -> None:
            async for update in self._of_choice(choice):
                await room.acquire()
                queue.put_nowait(update)

        tasks = [asyncio.create_task(fill(choice)) for choice in self.choices]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            remaining = len(tasks)
            while remaining:
                found = await queue.get()
                if isinstance(found, Update):
                    room.release()
                    yield found
                else:
                    found.result()
                    remaining -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _submit(self, plan: Plan, keeper: AnswerKeeper | None) -> None:
        generation, codec = self.generation, self.model.lm.codec
        n = generation.n
        request = Request(
            plan.ids,
            max_new_tokens=generation.max_new_tokens,
            sampling=generation.sampling,
            stop_token_ids=generation.stop_token_ids,
            num_logprobs=generation.num_logprobs,
            deadline=self._deadline,
            start=plan.start,
            keep=keeper is not None,
            checkpoint=None if plan.shared is None else plan.shared.num_tokens,
        )
        watches = None
        if generation.stop:
            watches = [StopText(codec, plan.ids, generation.stop) for _ in range(n)]
        for stream in self.model.engine.submit_many(request, n, ends_at=watches):
            text = AnswerText(codec, plan.ids, generation.stop, generation.num_logprobs is not None)
            choice = Choice(len(self.choices), stream, text, keeper, plan.shared)
            self.choices.append(choice)

    async def _of_choice(self, choice: Choice) -> AsyncGenerator[Update, None]:
        text, keeper = choice.text, choice.keeper
        try:
            async for tokens in self._batches(choice.stream):
                if choice.shared is not None and choice.stream.checkpoint is not None:
                    choice.shared.keep(choice.stream.checkpoint)
                    choice.shared = None
                piece = text.push(tokens)
                if keeper is not None:
                    keeper.add(tokens, piece.text)
                if piece:
                    yield Update(choice.index, piece)
        except LminfError as error:
            raise of_ours(error) from None
        piece = text.finish()
        finish_reason = self._finish_reason(choice)
        if keeper is not None and choice.stream.kept is not None:
            keeper.add((), piece.text)
            assert choice.stream.finish_reason is not None
            await keeper.keep(choice.stream.kept, choice.stream.finish_reason)
        yield Update(choice.index, piece, finish_reason)

    async def _batches(self, stream: TokenStream) -> AsyncGenerator[list[Token], None]:
        """Yield the tokens that are there, whenever there are any, but not too often."""
        name, latest, due = self.model.name, None, 0.0
        async for token in stream:
            now = time.perf_counter()
            if now < due and stream.finish_reason is None:
                await asyncio.sleep(due - now)
                now = time.perf_counter()
            tokens = [token, *stream.take()]
            due = now + self._event_seconds
            count = len(tokens)
            if latest is None and stream.first_token_at is not None:
                latest, count = stream.first_token_at, count - 1
                self._metrics.began(name, latest - stream.submitted)
            if latest is not None:
                self._metrics.went_on(name, now - latest, count)
            latest = now
            yield tokens

    def _finish_reason(self, choice: Choice) -> str:
        reason = choice.stream.finish_reason
        if choice.text.stopped or reason in ("stop_token", "stop_text"):
            return "stop"
        if reason == "length" or (reason == "deadline" and choice.stream.num_tokens):
            return "length"
        if reason == "deadline":
            raise ApiError(
                503, f"no slot was free in {self._deadline:g} s", code="timeout", retry=True
            )
        if reason == "slow_reader":
            raise ApiError(408, "the answer was not read for too long", code="slow_reader")
        raise shutting_down()
