"""From a caller's request to sequences that an engine can run, everything checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lminf_export.errors import InputError, shown
from lminf_export.operator.settings import as_integer, as_number
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.batching.sequence import RunningSequence
from lminf_export.runtime.batching.stream import Mailbox
from lminf_export.runtime.drawing import drawing_of
from lminf_export.runtime.inputs import checked_prompt, listed_ids, one_by_one
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.sampling import Sampler, SamplingConfig
from lminf_export.runtime.snapshot import Snapshot

MAX_LOGPROBS = 20


class Acceptor:
    """Checks requests in the thread that brings them, so that the engine's need not.

    Args:
        lm: that serves them.
        on_call: see `Mailbox`.
        reader_timeout: seconds that a request may wait for its reader.
    """

    def __init__(
        self, lm: LanguageModel, on_call: Callable[[], None], reader_timeout: float
    ) -> None:
        manifest = lm.bundle.manifest
        self._vocab_size = lm.vocab_size
        self._max_position = manifest.max_position
        self._window = manifest.lambda_config.window_size
        self._stops = frozenset(manifest.eos_token_ids)
        self._contract, self._state_id = manifest.contract, lm.state_id
        self._drawing = drawing_of(lm.session.library)
        self._on_call = on_call
        self._reader_timeout = reader_timeout

    def accepted(
        self, request: Request, n: int, ends_at: Sequence[Callable[[int], bool]] | None = None
    ) -> list[RunningSequence]:
        """Return n sequences of a request.

        Args:
            request: checked here.
            n: at least 1.
            ends_at: `Request.ends_at` of each; by default the request's own.

        Raises:
            InputError: something in the request cannot be served.
            SessionError: it is to go on from a state of another bundle, or a damaged one.
        """
        if not isinstance(request, Request):
            raise InputError(f"expected a Request, found {type(request).__name__}")
        prompt = checked_prompt(request.prompt_ids, self._vocab_size)[0]
        begins_at = self._start_of(request)
        room = self._max_position - begins_at - len(prompt)
        if room < 0:
            raise InputError(
                f"the stream would reach token {self._max_position - room}; positions are exact "
                f"up to {self._max_position} only: start a new state"
            )
        limit = self._limit(request, room)
        requests = [self._plain(request, len(prompt))] * n
        if ends_at is not None:
            ends_at = list(itertools.islice(one_by_one(ends_at, "ends_at"), n + 1))
            if len(ends_at) != n:
                raise InputError(f"ends_at: expected a function for each of {n} continuations")
            requests = [replace(requests[0], ends_at=function) for function in ends_at]
        stops = self._stops
        if request.stop_token_ids is not None:
            stops = frozenset(listed_ids(request.stop_token_ids, "stop_token_ids"))
        sequences = []
        for index, one in enumerate(requests):
            if one.ends_at is not None and not callable(one.ends_at):
                raise InputError(f"ends_at={shown(one.ends_at)}: must be a function of a token id")
            mailbox = Mailbox(len(prompt), self._on_call)
            sampler = self._sampler(one.sampling, index, prompt)
            sequences.append(
                RunningSequence(one, prompt, stops, limit, sampler, mailbox, self._reader_timeout)
            )
        return sequences

    def _start_of(self, request: Request) -> int:
        if request.start is None:
            return 0
        if not isinstance(request.start, Snapshot):
            raise InputError(f"start is a {type(request.start).__name__}; expected a Snapshot")
        if request.start.batch_size != 1:
            raise InputError(
                f"start has {request.start.batch_size} streams; choose one with Snapshot.rows"
            )
        request.start.require_fit(self._contract, 1, self._state_id)
        return int(request.start.past_length[0])

    @staticmethod
    def _limit(request: Request, room: int) -> int:
        if request.max_new_tokens is None:
            return room + 1
        wanted = as_integer("max_new_tokens", request.max_new_tokens, 0, InputError)
        return min(wanted, room + 1)

    @staticmethod
    def _plain(request: Request, num_prompt_tokens: int) -> Request:
        """Return a request whose numbers are plain ones, everything checked that is left."""
        count, deadline = request.num_logprobs, request.deadline
        checkpoint = request.checkpoint
        if not isinstance(request.sampling, SamplingConfig):
            raise InputError(f"sampling={shown(request.sampling)}: must be a SamplingConfig")
        if not isinstance(request.keep, bool):
            raise InputError(f"keep={shown(request.keep)}: must be True or False")
        if count is not None:
            count = as_integer("num_logprobs", count, 0, InputError, maximum=MAX_LOGPROBS)
        if deadline is not None:
            deadline = as_number("deadline", deadline, InputError)
            if deadline < 0:
                raise InputError(f"deadline={deadline}: must be seconds, at least 0")
        if checkpoint is not None:
            checkpoint = as_integer(
                "checkpoint", checkpoint, 1, InputError, maximum=num_prompt_tokens
            )
        return replace(request, num_logprobs=count, deadline=deadline, checkpoint=checkpoint)

    def _sampler(self, config: SamplingConfig, index: int, prompt: np.ndarray) -> Sampler | None:
        """Return the sampler of continuation `index`; None if it takes the likeliest token."""
        if config.is_plain_greedy:
            return None
        if config.seed is not None:
            config = replace(config, seed=config.seed + index)
        sampler = Sampler(config, self._vocab_size, self._window, self._drawing)
        sampler.observe(prompt[-self._window :].tolist())
        return sampler
