"""Requests of a Dynamo frontend as requests of an engine, and an engine's tokens as its chunks.

Nothing here imports Dynamo: its requests and chunks are dicts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lminf_export import Request, SamplingConfig
from lminf_export.errors import InputError, SessionError, shown
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.batching.request import FinishReason, Token
from lminf_export.runtime.batching.stream import TokenStream

# Dynamo's name of a setting → the value with which it asks for nothing.
NOT_OFFERED: dict[str, dict[str, Any]] = {
    "sampling_options": {
        "n": 1,
        "best_of": 1,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "guided_decoding": None,
    },
    "stop_conditions": {"min_tokens": 0, "max_thinking_tokens": None},
    "output_options": {"prompt_logprobs": None},
}
# JSON has no infinity; OpenAI's API puts this for a token that is impossible.
_LEAST = -9999.0
_OTHER_WORKERS = ("multi_modal_data", "prefill_result", "encoder_result", "bootstrap_info")
_REASONS: dict[FinishReason, str] = {
    "length": "length",
    "stop_token": "stop",
    "stop_text": "stop",
    "cancelled": "cancelled",
    "closed": "cancelled",
}


@dataclass(frozen=True)
class Limits:
    """Bounds that the worker sets on every request; the frontend checks none of them.

    Attributes:
        default_max_tokens: tokens of an answer where the request names no number.
        context_length: tokens of a prompt and its answer together.
    """

    default_max_tokens: int
    context_length: int


def engine_request(
    asked: Mapping[str, Any], eos_token_ids: frozenset[int], limits: Limits
) -> Request:
    """Return the engine's form of a frontend's request.

    Stop strings are the frontend's: it has the text. It cancels a request that has reached one.

    Args:
        asked: as Dynamo's preprocessor sends it, with `token_ids`.
        eos_token_ids: the bundle's, which end a text unless `ignore_eos` is set.
        limits: of prompt and answer.

    Raises:
        InputError: it asks for what the engine does not offer or for more than the limits, or its
            prompt is no list.
        ConfigError: a sampling setting is outside its rule.
    """
    _refuse_what_is_not_offered(asked)
    prompt_ids = asked.get("token_ids")
    if not isinstance(prompt_ids, list):
        raise InputError(f"token_ids={shown(prompt_ids)}: must be a list of token ids")
    options, stops = _part(asked, "sampling_options"), _part(asked, "stop_conditions")
    max_tokens = stops.get("max_tokens")
    if max_tokens is None:
        max_tokens = limits.default_max_tokens
    max_tokens = as_integer("max_tokens", max_tokens, 0, InputError)
    if len(prompt_ids) + max_tokens > limits.context_length:
        raise InputError(
            f"{len(prompt_ids)} tokens of a prompt and {max_tokens} of an answer: this worker "
            f"takes {limits.context_length} together"
        )
    ends = frozenset() if stops.get("ignore_eos") else eos_token_ids
    for name in ("stop_token_ids", "stop_token_ids_hidden"):
        ends |= frozenset(stops.get(name) or ())
    shown_ends = frozenset(stops.get("stop_token_ids_visible") or ())
    return Request(
        prompt_ids,
        max_new_tokens=max_tokens,
        sampling=_sampling(options),
        stop_token_ids=ends - shown_ends,
        ends_at=shown_ends.__contains__ if shown_ends else None,
        num_logprobs=_part(asked, "output_options").get("logprobs"),
    )


async def chunks(
    stream: TokenStream, text_of: Callable[[int], str]
) -> AsyncIterator[dict[str, Any]]:
    """Give a stream's tokens as chunks: all that are there in one, the reason of the end last.

    Args:
        stream: of the request.
        text_of: gives the text of one token, for log probabilities.

    Raises:
        LminfError: what ended the request, other than itself and its reader.
    """
    async for token in stream:
        yield _chunk([token, *stream.take()], text_of)
    reason = stream.finish_reason
    if reason not in _REASONS:
        raise SessionError(f"the request ended early: {reason}")
    read, written = stream.num_prompt_tokens, stream.num_tokens
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    end = {"finish_reason": _REASONS[reason], "completion_usage": usage}
    yield {"token_ids": [], "index": 0, **end}


def _part(asked: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = asked.get(name) or {}
    if not isinstance(part, Mapping):
        raise InputError(f"{name}={shown(part)}: must be an object")
    return part


def _refuse_what_is_not_offered(asked: Mapping[str, Any]) -> None:
    for part, names in NOT_OFFERED.items():
        for name, nothing in names.items():
            value = _part(asked, part).get(name)
            if value is not None and value != nothing:
                raise InputError(f"{name}={shown(value)}: this worker does not offer it")
    for name in _OTHER_WORKERS:
        if asked.get(name):
            raise InputError(f"{name}: this worker reads token ids, and none of other workers")


def _sampling(options: Mapping[str, Any]) -> SamplingConfig:
    """Return the settings that a request names, over the defaults of OpenAI's API."""
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    )
    named = {name: options[name] for name in names if options.get(name) is not None}
    if named.get("top_k") == -1:  # all tokens, as vLLM writes it
        named["top_k"] = 0
    return SamplingConfig(**{"temperature": 1.0, **named})


def _chunk(tokens: list[Token], text_of: Callable[[int], str]) -> dict[str, Any]:
    chunk: dict[str, Any] = {"token_ids": [token.id for token in tokens], "index": 0}
    if tokens[0].logprob is not None:
        chunk["log_probs"] = [_finite(token.logprob) for token in tokens]
        chunk["top_logprobs"] = [
            [
                {"rank": rank, "token_id": id_, "token": text_of(id_), "logprob": _finite(logprob)}
                for rank, (id_, logprob) in enumerate(token.top, 1)
            ]
            for token in tokens
        ]
    return chunk


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
