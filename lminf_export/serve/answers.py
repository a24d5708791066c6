"""A request's answer on its way to the client: as events, or as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lminf_export.serve.answer_text import Placed
from lminf_export.serve.answering import Update, Usage
from lminf_export.serve.api_errors import ApiError
from lminf_export.serve.serving import Running
from lminf_export.serve.sse import DONE, EventStream, disconnected, event, json_bytes


class AnswerFormat(Protocol):
    """The form of one endpoint's answers."""

    def first_chunks(self, num_choices: int) -> Iterable[dict[str, Any]]:
        """Return what a stream begins with."""

    def chunk(self, update: Update) -> Iterable[dict[str, Any]]:
        """Return what a stream says of an update."""

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return what a stream says at its end."""

    def whole(self, choices: list[WholeChoice], usage: Usage) -> dict[str, Any]:
        """Return an answer that is not streamed."""


class WholeChoice:
    """A choice whose text is complete."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.tokens: list[Placed] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


async def send(request: Request, running: Running, form: AnswerFormat) -> Response:
    """Return the response to a request that is being answered."""
    if running.answering.generation.stream:
        return EventStream(_events(running, form), running.headers, running.close)
    try:
        return await _whole(request, running, form)
    finally:
        running.close()


async def _events(running: Running, form: AnswerFormat) -> AsyncGenerator[bytes, None]:
    answering = running.answering
    num_choices = unfinished = len(answering.choices)
    yield b"".join(map(event, form.first_chunks(num_choices)))
    try:
        async for update in answering.updates():
            if update.finish_reason is not None:
                unfinished -= 1
            if not unfinished:
                running.release_session()
            yield b"".join(map(event, form.chunk(update)))
    except ApiError as error:
        # A client that waits for [DONE] knows that the answer is incomplete.
        yield event(error.body)
        return
    if answering.generation.include_usage:
        yield event(form.usage_chunk(answering.usage()))
    yield DONE


async def _whole(request: Request, running: Running, form: AnswerFormat) -> Response:
    watch = asyncio.create_task(disconnected(request.receive))
    work = asyncio.create_task(_collected(running))
    try:
        await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        choices = work.result()
    finally:
        for task in (watch, work):
            task.cancel()
        await asyncio.gather(watch, work, return_exceptions=True)
    usage = running.answering.usage()
    # Long answers, and those with log probabilities, take a while to write.
    body = await asyncio.to_thread(lambda: json_bytes(form.whole(choices, usage)))
    return Response(body, 200, running.headers, media_type="application/json")


async def _collected(running: Running) -> list[WholeChoice]:
    choices = [WholeChoice() for _ in running.answering.choices]
    async for update in running.answering.updates():
        choice = choices[update.index]
        choice.pieces.append(update.piece.text)
        choice.tokens.extend(update.piece.tokens)
        choice.finish_reason = update.finish_reason
    return choices
