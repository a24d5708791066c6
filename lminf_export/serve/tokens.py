"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from lminf_export.serve.api_errors import invalid
from lminf_export.serve.bodies import read_json
from lminf_export.serve.contents import chat_messages, require_ids, require_text
from lminf_export.serve.openai_schema import DetokenizeFields, TokenizeFields, read_fields
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.serving import Serving
from lminf_export.serve.sse import json_bytes


async def tokenize(serving: Serving, request: Request) -> Response:
    """Turn a text, or messages, into token ids.

    Raises:
        ApiError, LminfError: it cannot be done.
    """
    fields = read_fields(TokenizeFields, await read_json(request, serving.settings))
    model = serving.model(fields.model)
    limit = serving.settings.max_prompt_tokens

    def tokenized() -> Response:
        ids = _ids(model, fields)
        _require_few(ids, limit)
        # Both names: the second is the one that other servers use.
        return _json({"model": model.name, "count": len(ids), "ids": ids, "tokens": ids})

    return await asyncio.to_thread(tokenized)


async def detokenize(serving: Serving, request: Request) -> Response:
    """Turn token ids into text.

    Raises:
        ApiError, LminfError: it cannot be done.
    """
    fields = read_fields(DetokenizeFields, await read_json(request, serving.settings))
    model = serving.model(fields.model)
    ids = fields.ids if fields.ids is not None else fields.tokens
    if ids is None or (fields.ids is not None and fields.tokens is not None):
        raise invalid("give token ids once, as ids or as tokens", "ids")
    _require_few(ids, serving.settings.max_prompt_tokens)
    require_ids(ids, model.lm.vocab_size, "ids")
    text = await asyncio.to_thread(lambda: "".join(model.lm.codec.stream(ids)))
    return _json({"model": model.name, "text": text, "prompt": text})


def _require_few(ids: list[int], limit: int) -> None:
    """Refuse more tokens than a prompt may have.

    Raises:
        ApiError: 400.
    """
    if len(ids) > limit:
        raise invalid(
            f"{len(ids)} tokens; at most {limit}, as in a prompt", code="context_length_exceeded"
        )


def _ids(model: ServedModel, fields: TokenizeFields) -> list[int]:
    texts = [text for text in (fields.text, fields.prompt, fields.content) if text is not None]
    if len(texts) + (fields.messages is not None) != 1:
        raise invalid("give text, prompt or content, or messages", "text")
    codec = model.lm.codec
    if texts:
        require_text(texts[0], "text", "text")
        return codec.ids(texts[0], add_special_tokens=fields.add_special_tokens is not False)
    messages = chat_messages(fields.messages)
    prompted = fields.add_generation_prompt is not False
    return codec.ids(model.require_template().render(messages, add_generation_prompt=prompted))


def _json(content: dict[str, object]) -> Response:
    return Response(json_bytes(content), media_type="application/json")
