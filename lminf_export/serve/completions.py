"""`/v1/completions`: texts, or token ids, go on."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lminf_export.serve.answering import Update, Usage
from lminf_export.serve.answers import WholeChoice, send
from lminf_export.serve.api_errors import invalid
from lminf_export.serve.bodies import read_json
from lminf_export.serve.caller import caller_of
from lminf_export.serve.contents import prompts_of
from lminf_export.serve.generation import Generation, generation_of
from lminf_export.serve.log_probabilities import completion_logprobs
from lminf_export.serve.openai_schema import (
    CompletionFields,
    read_fields,
    require_plain_completion,
)
from lminf_export.serve.planning import Plan, plan_prompt
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.serving import Serving
from lminf_export.serve.state_store import Conversation


async def complete(serving: Serving, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError, LminfError: it cannot be served.
    """
    serving.require_open()
    fields = read_fields(CompletionFields, await read_json(request, serving.settings))
    require_plain_completion(fields)
    model = serving.model(fields.model)
    generation = generation_of(fields, serving.settings, model.lm.bundle.manifest)
    most = serving.settings.max_choices

    def plans(conversation: Conversation | None) -> list[Plan]:
        prompts = prompts_of(fields.prompt, model.lm.vocab_size, most)
        if len(prompts) * generation.n > most:
            raise invalid(f"prompts times n must be at most {most}", "n")
        return [plan_prompt(prompt, model.lm.codec, conversation) for prompt in prompts]

    running = await serving.begin(caller_of(request), model, generation, plans)
    return await send(request, running, _CompletionFormat(model, generation))


class _CompletionFormat:
    """Writes completions."""

    def __init__(self, model: ServedModel, generation: Generation) -> None:
        self._model = model
        self._generation = generation
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    def first_chunks(self, num_choices: int) -> Iterable[dict[str, Any]]:
        """Return nothing: text begins a completion."""
        return ()

    def chunk(self, update: Update) -> Iterable[dict[str, Any]]:
        """Return a choice's text."""
        choice = self._choice(
            update.index, update.piece.text, update.piece.tokens, update.finish_reason
        )
        found = {**self._head, "choices": [choice]}
        if self._generation.include_usage:
            found["usage"] = None
        return (found,)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the counts, with no choice."""
        return {**self._head, "choices": [], "usage": usage.body}

    def whole(self, choices: list[WholeChoice], usage: Usage) -> dict[str, Any]:
        """Return all choices and the counts."""
        found = [
            self._choice(index, choice.text, choice.tokens, choice.finish_reason)
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "choices": found, "usage": usage.body}

    def _choice(self, index: int, text: str, tokens: Any, reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._generation.num_logprobs is not None:
            logprobs = completion_logprobs(tokens, self._model.token_bytes)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
