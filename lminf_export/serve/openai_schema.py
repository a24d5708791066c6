"""The fields of requests as OpenAI's API names them, and what may stand in them."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lminf_export.serve.api_errors import invalid, unsupported

_INT64 = 1 << 63
# Entries of an object; more names, or more biases, than any client sends.
_MOST_NAMES = 128
_MOST_BIASES = 16384
# Lists whose first wrong item is found here: pydantic would name all of a million.
_LISTS = {"stop": str, "stop_token_ids": int, "ids": int, "tokens": int}
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationFields(BaseModel):
    """Fields of every request for text; null stands for a field that is absent.

    Those in the second part are other servers'; those in the third are accepted since clients
    send them, and mean nothing here.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    top_k: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None


class CompletionFields(GenerationFields):
    """A request to continue a text."""

    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None


class ChatFields(GenerationFields):
    """A request for the next message of a chat."""

    messages: Any = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class TokenizeFields(BaseModel):
    """A request to turn text or messages into token ids."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    text: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeFields(BaseModel):
    """A request to turn token ids into text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    tokens: list[int] | None = None
    ids: list[int] | None = None


Fields = TypeVar("Fields", bound=BaseModel)


def read_fields(kind: type[Fields], body: dict[str, Any]) -> Fields:
    """Return the fields of a request's body.

    Raises:
        ApiError: 400, naming the field.
    """
    if len(body) > _MOST_NAMES:
        raise invalid(f"the body has {len(body)} names; at most {_MOST_NAMES}")
    biases = body.get("logit_bias")
    if isinstance(biases, dict) and len(biases) > _MOST_BIASES:
        raise invalid(f"{len(biases)} biases; at most {_MOST_BIASES}", "logit_bias")
    options = body.get("stream_options")
    if isinstance(options, dict) and len(options) > _MOST_NAMES:
        raise invalid(f"stream_options has {len(options)} names", "stream_options")
    for name in _LISTS.keys() & kind.model_fields.keys():
        items = body.get(name)
        if isinstance(items, list) and (wrong := _first_other(items, _LISTS[name])) is not None:
            expected = "a text" if _LISTS[name] is str else "an integer"
            raise invalid(f"{name}[{wrong}]: must be {expected}", name, "invalid_value")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        if first["type"] == "extra_forbidden":
            name = ".".join(str(part) for part in first["loc"])
            raise invalid(
                f"unrecognized request argument: {name or repr(name)}",
                name[:100],
                "unknown_parameter",
            ) from None
        raise invalid(f"{place}: {first['msg']}", place[:100], "invalid_value") from None


def _first_other(items: list[Any], kind: type) -> int | None:
    """Return the place of the first item of another type."""
    return next((place for place, item in enumerate(items) if type(item) is not kind), None)


def require_plain_chat(fields: ChatFields) -> None:
    """Refuse what asks for more than text.

    Raises:
        ApiError: 400, naming the field.
    """
    for name in (
        "tools", "functions", "audio", "prediction", "web_search_options", "reasoning_effort",
        "verbosity",
    ):  # fmt: skip
        if getattr(fields, name) not in (None, [], {}):
            raise unsupported(name)
    if fields.response_format not in (None, {"type": "text"}):
        raise unsupported("response_format", ' other than {"type": "text"}')
    if fields.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice")
    if fields.function_call not in (None, "none", "auto"):
        raise unsupported("function_call")
    if fields.modalities not in (None, ["text"]):
        raise unsupported("modalities", ' other than ["text"]')
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")


def require_plain_completion(fields: CompletionFields) -> None:
    """Refuse what asks for more than a continuation.

    Raises:
        ApiError: 400, naming the field.
    """
    if fields.echo not in (None, False):
        raise unsupported("echo")
    if fields.suffix not in (None, ""):
        raise unsupported("suffix")
    if fields.best_of is True or fields.best_of not in (None, fields.n or 1):
        raise unsupported("best_of", " other than n")
