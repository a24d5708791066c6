"""Requests for an engine, and what comes back: tokens, the reason of the end, a kept state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lminf_export.runtime.sampling import SamplingConfig
from lminf_export.runtime.snapshot import Snapshot

# Why a request ended: as many tokens as it asked for; a stop token; `Request.ends_at`; cancelled
# by its caller; later than its deadline; its reader took nothing for too long; the engine closed.
FinishReason = Literal[
    "length", "stop_token", "stop_text", "cancelled", "deadline", "slow_reader", "closed"
]


@dataclass(frozen=True)
class Kept:
    """Where a stream stands, to go on from.

    Attributes:
        snapshot: of one stream.
        unread: token ids of the stream that the snapshot has not read; they come first in what
            is read next. The latest token that was chosen is one, a stop token included.
    """

    snapshot: Snapshot
    unread: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to continue.

    Attributes:
        prompt_ids: token ids to read, at least one; behind what `start` has read, if given.
        max_new_tokens: how many tokens at most; None for no end, 0 only reads the prompt.
        sampling: how tokens are chosen.
        stop_token_ids: ids that end the text and are not returned; None for the bundle's.
        ends_at: called in the engine's thread with each token; True ends the request with it.
            The token is returned. It must be quick and must not raise.
        num_logprobs: None for no log probabilities; else the likeliest tokens to return beside
            the chosen one, 0 … 20.
        deadline: seconds from `submit` until the request ends, waiting included; None for none.
        start: a state of one stream to go on from, which is copied; None for a new one.
        keep: return the state at the end, in `TokenStream.kept`.
        checkpoint: return the state behind so many of `prompt_ids`, too, 1 … P, in
            `TokenStream.checkpoint`; None for none. A multiple of the bundle's chunk size, counted
            from the stream's beginning, cuts the prompt where it is cut anyway.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int | None = 256
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_token_ids: frozenset[int] | None = None
    ends_at: Callable[[int], bool] | None = None
    num_logprobs: int | None = None
    deadline: float | None = None
    start: Snapshot | None = None
    keep: bool = False
    checkpoint: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a stream.

    Attributes:
        id: token id.
        logprob: natural logarithm of its probability under the model's own logits, before
            penalties, temperature and filters; None if not asked for.
        top: the likeliest tokens and their log probabilities, best first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
