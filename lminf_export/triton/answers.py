"""Requests of Triton's and their answers, without anything of Triton itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lminf_export.disk import parse_json
from lminf_export.errors import InputError, shown
from lminf_export.serve.caller import Caller
from lminf_export.serve.contents import chat_messages, require_ids
from lminf_export.serve.generation import Generation, generation_of
from lminf_export.serve.openai_schema import (
    ChatFields,
    CompletionFields,
    read_fields,
    require_plain_chat,
    require_plain_completion,
)
from lminf_export.serve.planning import Plan, plan_chat, plan_prompt
from lminf_export.serve.served_model import ServedModel
from lminf_export.serve.serving import Planner, Running, Serving
from lminf_export.serve.sessions import session_key
from lminf_export.serve.state_store import Conversation

# Triton has no keys of its own: whoever reaches it is one owner.
_OWNER = "triton"
_LONGEST_ID = 128
# How soon a client's going is seen while nothing else happens.
_WATCH_SECONDS = 0.05
# Fields of a body that tensors stand for, or Triton's address.
_OUTSIDE = ("prompt", "messages", "stream", "stream_options", "model")


@dataclass(frozen=True)
class Asked:
    """A request as its tensors have it.

    Attributes:
        sequence: correlation id; 0 or "" for an answer outside of any session.
        starts: the session begins anew.
        ends: the session is forgotten behind the answer.
        text: to continue, or None.
        ids: to continue, or None.
        messages: JSON of a chat's, or None.
        sampling: JSON of an object.
        parameters: further fields of sampling, which the request has beside its tensors.
        stream: send text as it is written.
        with_ids: send token ids, too.
    """

    sequence: int | str = 0
    starts: bool = False
    ends: bool = False
    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: str | None = None
    sampling: str = "{}"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    with_ids: bool = False


@dataclass
class Reply:
    """A part of an answer, or all of it."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


async def answer(
    serving: Serving, model: ServedModel, asked: Asked, has_gone: Callable[[], bool]
) -> AsyncGenerator[Reply, None]:
    """Yield the answer to a request, whose slot is free at the end, or when its client has gone.

    Args:
        serving: sessions and limits.
        model: that answers.
        asked: by the client.
        has_gone: whether it waits no more.

    Raises:
        ApiError, LminfError: it cannot be served.
    """
    generation, planner = _plan(serving, model, asked)
    caller, key = _caller(model, asked)
    running = await serving.begin(caller, model, generation, planner)
    watching = asyncio.create_task(_watch(running, has_gone))
    try:
        async for reply in _replies(running, asked):
            if reply.finish_reason:
                if key is not None and asked.ends:
                    await serving.sessions.drop(key)
                running.release_session()
            yield reply
    finally:
        running.close()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _replies(running: Running, asked: Asked) -> AsyncGenerator[Reply, None]:
    texts: list[str] = []
    ids: list[int] = []
    reply = Reply()
    async for update in running.answering.updates():
        usage = running.answering.usage()
        reply = Reply(
            update.piece.text,
            [placed.token.id for placed in update.piece.tokens],
            update.finish_reason or "",
            usage.prompt,
            usage.cached,
            usage.completion,
        )
        if asked.stream:
            yield reply
            continue
        texts.append(reply.text)
        ids += reply.ids
    if not asked.stream:
        yield replace(reply, text="".join(texts), ids=ids)


async def _watch(running: Running, has_gone: Callable[[], bool]) -> None:
    while not has_gone():
        await asyncio.sleep(_WATCH_SECONDS)
    running.answering.close()


def _caller(model: ServedModel, asked: Asked) -> tuple[Caller, str | None]:
    """Return whose session a request is of, and the key that it is kept under."""
    if asked.sequence in (0, ""):
        if asked.starts or asked.ends:
            raise InputError("the beginning or the end of a sequence needs a sequence id")
        return Caller(_OWNER), None
    name = str(asked.sequence)
    if len(name) > _LONGEST_ID:
        raise InputError(f"a sequence id has at most {_LONGEST_ID} characters, found {len(name)}")
    caller = Caller(_OWNER, name, must_exist=not asked.starts, begins=asked.starts, ends=asked.ends)
    return caller, session_key(model.name, _OWNER, name)


def _plan(serving: Serving, model: ServedModel, asked: Asked) -> tuple[Generation, Planner]:
    """Return how the answer is written, and what reads the prompt."""
    given = [x for x in (asked.text, asked.ids, asked.messages) if x is not None]
    if len(given) != 1:
        raise InputError("give one of text_input, input_ids and messages")
    fields = _fields(asked)
    if fields.n not in (None, 1):
        raise InputError("n must be 1: an answer is one text")
    manifest, codec = model.lm.bundle.manifest, model.lm.codec
    if isinstance(fields, ChatFields):
        template = model.require_template()
        messages = chat_messages(_json("messages", asked.messages or ""))
        generation = generation_of(fields, serving.settings, manifest, model.end_ids)

        def planner(conversation: Conversation | None) -> list[Plan]:
            return [plan_chat(messages, template, codec, conversation)]

    else:
        generation = generation_of(fields, serving.settings, manifest)

        def planner(conversation: Conversation | None) -> list[Plan]:
            prompt = asked.text if asked.text is not None else list(asked.ids or ())
            if isinstance(prompt, list):
                require_ids(prompt, model.lm.vocab_size, "input_ids")
                # A sequence may go on by itself, as it does behind an empty text.
                if conversation is None and not prompt:
                    raise InputError("input_ids is empty: give at least one token id")
            return [plan_prompt(prompt, codec, conversation)]

    # Token ids come with their places, as they do for log probabilities.
    if asked.with_ids and generation.num_logprobs is None:
        generation = replace(generation, num_logprobs=0)
    return generation, planner


def _fields(asked: Asked) -> CompletionFields | ChatFields:
    sampling = _json("sampling_parameters", asked.sampling)
    if not isinstance(sampling, Mapping):
        raise InputError("sampling_parameters: expected a JSON object")
    for name in _OUTSIDE:
        if name in sampling:
            raise InputError(f"sampling_parameters: {name} is no parameter of sampling")
    for name, value in asked.parameters.items():
        if name in _OUTSIDE:
            raise InputError(f"{name} is no parameter of sampling")
        if name in sampling and sampling[name] != value:
            raise InputError(
                f"{shown(name)} is given twice: {shown(sampling[name])} in sampling_parameters, "
                f"{shown(value)} as a parameter of the request"
            )
    body: dict[str, Any] = {**sampling, **asked.parameters, "stream": asked.stream}
    fields: CompletionFields | ChatFields
    if asked.messages is not None:
        fields = read_fields(ChatFields, body)
        require_plain_chat(fields)
    else:
        fields = read_fields(CompletionFields, body)
        require_plain_completion(fields)
    if fields.logprobs not in (None, False):
        raise InputError("logprobs: no output of this model has them")
    return fields


def _json(name: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{name}: no JSON: {error}") from None
