"""`/v1/chat/completions`: the next message of a chat."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lminf_export.serve.answer_text import Placed
from lminf_export.serve.answering import Update, Usage
from lminf_export.serve.answers import WholeChoice, send
from lminf_export.serve.bodies import read_json
from lminf_export.serve.caller import caller_of
from lminf_export.serve.contents import chat_messages
from lminf_export.serve.generation import Generation, generation_of
from lminf_export.serve.log_probabilities import chat_logprobs
from lminf_export.serve.openai_schema import ChatFields, read_fields, require_plain_chat
from lminf_export.serve.planning import Plan, plan_chat
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.serving import Serving
from lminf_export.serve.state_store import Conversation


async def chat(serving: Serving, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError, LminfError: it cannot be served.
    """
    serving.require_open()
    fields = read_fields(ChatFields, await read_json(request, serving.settings))
    require_plain_chat(fields)
    model = serving.model(fields.model)
    generation = generation_of(fields, serving.settings, model.lm.bundle.manifest, model.end_ids)
    template = model.require_template()

    def plans(conversation: Conversation | None) -> list[Plan]:
        messages = chat_messages(fields.messages)
        return [plan_chat(messages, template, model.lm.codec, conversation)]

    running = await serving.begin(caller_of(request), model, generation, plans)
    return await send(request, running, _ChatFormat(model, generation))


class _ChatFormat:
    """Writes messages, and in a stream what is new of them."""

    def __init__(self, model: ServedModel, generation: Generation) -> None:
        self._model = model
        self._generation = generation
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
        }

    def first_chunks(self, num_choices: int) -> Iterable[dict[str, Any]]:
        """Return the role, once for each choice."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta, [], None) for index in range(num_choices)]

    def chunk(self, update: Update) -> Iterable[dict[str, Any]]:
        """Return the text, and at the end an empty delta with the reason."""
        piece = update.piece
        if piece:
            yield self._chunk(update.index, {"content": piece.text}, piece.tokens, None)
        if update.finish_reason is not None:
            yield self._chunk(update.index, {}, [], update.finish_reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the counts, with no choice."""
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage.body,
        }

    def whole(self, choices: list[WholeChoice], usage: Usage) -> dict[str, Any]:
        """Return all messages and the counts."""
        found = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.tokens, always=True),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": found, "usage": usage.body}

    def _chunk(
        self, index: int, delta: dict[str, str], tokens: list[Placed], reason: str | None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens, always=False),
            "finish_reason": reason,
        }
        found = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._generation.include_usage:
            found["usage"] = None
        return found

    def _logprobs(self, tokens: list[Placed], *, always: bool) -> dict[str, Any] | None:
        if self._generation.num_logprobs is None or not (tokens or always):
            return None
        return chat_logprobs(tokens, self._model.token_bytes)
