"""From the fields of a request to an engine's settings, within the server's limits."""

from __future__ import annotations

from dataclasses import dataclass

from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import ConfigError
from lminf_export.runtime.sampling import SamplingConfig
from lminf_export.serve.api_errors import ApiError, invalid
from lminf_export.serve.contents import require_ids, require_text
from lminf_export.serve.openai_schema import ChatFields, CompletionFields, GenerationFields
from lminf_export.serve.settings import ServeSettings

_MAX_BIASES = 1024
# A probability that only the likeliest token is needed to reach.
_LIKELIEST_ONLY = 1e-9


@dataclass(frozen=True)
class Generation:
    """Settings of one answer.

    Attributes:
        sampling: how tokens are chosen.
        max_new_tokens: of each choice.
        n: choices of each prompt.
        stop: stop strings.
        stop_token_ids: as `Request.stop_token_ids`.
        num_logprobs: as `Request.num_logprobs`.
        stream: whether the answer is sent as it is written.
        include_usage: whether a stream ends with its counts.
    """

    sampling: SamplingConfig
    max_new_tokens: int
    n: int
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int] | None
    num_logprobs: int | None
    stream: bool
    include_usage: bool


def generation_of(
    fields: CompletionFields | ChatFields,
    settings: ServeSettings,
    manifest: Manifest,
    end_ids: frozenset[int] = frozenset(),
) -> Generation:
    """Return how a request to a bundle of this manifest wants its answer written.

    Args:
        fields: of the request.
        settings: the server's limits.
        manifest: of the bundle.
        end_ids: token ids that end an answer beside the manifest's.

    Raises:
        ApiError: 400, naming the field and the limit.
    """
    if fields.stream_options is not None and not fields.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    options = fields.stream_options
    n = fields.n or 1
    if n > settings.max_choices:
        raise invalid(f"n must be at most {settings.max_choices}", "n")
    num_logprobs = _num_logprobs(fields, settings)
    max_new_tokens = _max_new_tokens(fields, settings)
    stream = bool(fields.stream)
    if not stream:
        held = n * max_new_tokens * (1 if num_logprobs is None else 2 + num_logprobs)
        if held > settings.max_whole_tokens:
            raise invalid(
                "so many tokens, choices and log probabilities are only streamed: set stream, or "
                f"ask for less (limit {settings.max_whole_tokens})", "max_tokens",
            )  # fmt: skip
    return Generation(
        sampling=_sampling(fields, manifest.vocab_size),
        max_new_tokens=max_new_tokens,
        n=n,
        stop=_stops(fields.stop, settings),
        stop_token_ids=_stop_ids(fields, manifest, end_ids),
        num_logprobs=num_logprobs,
        stream=stream,
        include_usage=bool(options and options.include_usage),
    )


def _max_new_tokens(fields: CompletionFields | ChatFields, settings: ServeSettings) -> int:
    name, found = "max_tokens", fields.max_tokens
    if isinstance(fields, ChatFields) and fields.max_completion_tokens is not None:
        if found is not None and found != fields.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        name, found = "max_completion_tokens", fields.max_completion_tokens
    if found is None:
        return min(settings.default_max_tokens, settings.max_new_tokens)
    if found > settings.max_new_tokens:
        raise invalid(f"{name} must be at most {settings.max_new_tokens}", name)
    return found


def _num_logprobs(fields: CompletionFields | ChatFields, settings: ServeSettings) -> int | None:
    if isinstance(fields, CompletionFields):
        name, found = "logprobs", fields.logprobs
    else:
        name, found = "top_logprobs", (fields.top_logprobs or 0) if fields.logprobs else None
    if found is not None and found > settings.max_logprobs:
        raise invalid(f"{name} must be at most {settings.max_logprobs}", name)
    return found


def _stops(stop: str | list[str] | None, settings: ServeSettings) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > settings.max_stops:
        raise invalid(f"stop has {len(stops)} strings; at most {settings.max_stops}", "stop")
    for text in stops:
        if not 0 < len(text) <= settings.max_stop_length:
            raise invalid(
                f"a stop string has 1 … {settings.max_stop_length} characters, found {len(text)}",
                "stop",
            )
        require_text(text, "stop", "stop")
    return stops


def _stop_ids(
    fields: GenerationFields, manifest: Manifest, end_ids: frozenset[int]
) -> frozenset[int] | None:
    own = fields.stop_token_ids or []
    require_ids(own, manifest.vocab_size, "stop_token_ids")
    if fields.ignore_eos:
        return frozenset(own)
    ends = frozenset((*own, *end_ids))
    return ends.union(manifest.eos_token_ids) if ends else None


def _sampling(fields: GenerationFields, vocab_size: int) -> SamplingConfig:
    try:
        return SamplingConfig(
            temperature=1.0 if fields.temperature is None else fields.temperature,
            top_k=max(fields.top_k or 0, 0),
            top_p=1.0 if fields.top_p is None else max(fields.top_p, _LIKELIEST_ONLY),
            min_p=fields.min_p or 0.0,
            repetition_penalty=fields.repetition_penalty or 1.0,
            # OpenAI's seeds may be negative.
            seed=None if fields.seed is None else fields.seed % (1 << 64),
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            logit_bias=_biases(fields.logit_bias, vocab_size),
        )
    except ConfigError as error:
        raise invalid(str(error)) from None


def _biases(biases: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not biases:
        return None
    if len(biases) > _MAX_BIASES:
        raise invalid(f"logit_bias has {len(biases)} tokens; at most {_MAX_BIASES}", "logit_bias")
    found = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise _no_token(vocab_size)
        number = int(token)
        # "05" would be a second name of token 5.
        if number >= vocab_size or str(number) != token:
            raise _no_token(vocab_size)
        found[number] = bias
    return found


def _no_token(vocab_size: int) -> ApiError:
    return invalid(f"logit_bias: token ids are integers 0 … {vocab_size - 1}", "logit_bias")
