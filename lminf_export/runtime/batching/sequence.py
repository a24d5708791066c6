"""A request on its way: what it still has to read, how its tokens are chosen, when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from lminf_export.errors import InputError, LminfError, SessionError, shown
from lminf_export.runtime.batching.request import FinishReason, Kept, Request, Token
from lminf_export.runtime.batching.stream import Mailbox
from lminf_export.runtime.logprobs import logprobs_of
from lminf_export.runtime.sampling import Sampler
from lminf_export.runtime.snapshot import Snapshot

# Tokens that wait for a reader at most: its sequence then pauses, and goes on at half of them.
MAILBOX_TOKENS = 4096

# Why a sequence leaves its row: it has ended, or pauses for its reader.
Leaving = FinishReason | Literal["pause"]


class RunningSequence:
    """One request while an engine has it; only the engine's thread touches it.

    Args:
        request: checked.
        prompt: (P,) int64, its prompt.
        stops: ids that end it.
        limit: tokens it may choose at most; None for no end.
        sampler: chooses its tokens; None takes the likeliest.
        mailbox: where they go.
        reader_timeout: seconds that it may wait for its reader.

    Attributes:
        num_read: tokens of the prompt that its stream has read.
        latest: the token chosen last, which the stream has not read; None before the first.
        parked: its state while it has no row, behind the first admission; before it, its start.
        first_logits: (V,) logits behind the prompt, where another sequence has read it.
        is_greedy: whether its next token is that of the largest logit, and nothing else is asked.
        only_reads: whether it ends as soon as its prompt is read.
        others: sequences that wait for this one to have read the prompt they share.
        stalled_since: when it had to pause for its reader; None while it has not.
    """

    def __init__(
        self,
        request: Request,
        prompt: np.ndarray,
        stops: frozenset[int],
        limit: int | None,
        sampler: Sampler | None,
        mailbox: Mailbox,
        reader_timeout: float,
    ) -> None:
        self.request, self.prompt, self.mailbox = request, prompt, mailbox
        self.num_read = 0
        self.latest: int | None = None
        self.parked: Snapshot | None = request.start
        self.first_logits: np.ndarray | None = None
        self.others: list[RunningSequence] = []
        self.stalled_since: float | None = None
        deadline = request.deadline
        self.due = None if deadline is None else mailbox.submitted + deadline
        self.is_greedy = sampler is None and request.num_logprobs is None
        self.only_reads = limit == 0
        self._stops = stops
        self._limit = math.inf if limit is None else limit
        self._sampler = sampler
        self._ends_at = request.ends_at
        self._reader_timeout = reader_timeout

    @property
    def num_unread(self) -> int:
        """Tokens of the prompt that have not been read."""
        return len(self.prompt) - self.num_read

    @property
    def num_to_read(self) -> int:
        """Unread tokens of the prompt, those behind a checkpoint that comes first left out."""
        checkpoint = self.request.checkpoint
        ends = len(self.prompt) if checkpoint is None else checkpoint
        return (ends if self.num_read < ends else len(self.prompt)) - self.num_read

    def choose(self, logits: np.ndarray) -> tuple[int, Token | None]:
        """Choose a token from logits (V,); return it, with what is told of it, if anything is.

        Raises:
            InputError: a logit is not a number, or no token is possible.
            SessionError: the memory is short.
        """
        told = None
        try:
            if self._sampler is None:
                token = int(logits.argmax())
                require_number(float(logits[token]))
            else:
                token = self._sampler.choose(logits)
            if self.request.num_logprobs is not None:
                count = min(self.request.num_logprobs, len(logits))
                told = Token(token, *logprobs_of(logits, token, count))
        except MemoryError:
            raise SessionError("the memory is short: no token could be chosen") from None
        return token, told

    def give(
        self, token: int, told: Token | None, wakers: list[Callable[[], None]]
    ) -> Leaving | None:
        """Return a chosen token to whoever asked; tell why the sequence leaves its row, if so.

        Args:
            token: chosen.
            told: what is told of it, if anything is.
            wakers: gets what wakes the reader, if it waits.

        Raises:
            InputError: the request's own function raised an error.
        """
        self.latest = token
        if token in self._stops:
            return "stop_token"
        if self._sampler is not None:
            self._sampler.observe((token,))
        reason: Leaving | None = None
        if self._ends_at is not None:
            try:
                if self._ends_at(token):
                    reason = "stop_text"
            except LminfError:
                raise
            except BaseException as error:
                # Whatever one request's function raises must not end the others.
                raise InputError(f"Request.ends_at has failed: {shown(error)}") from error
        mailbox = self.mailbox
        waker = mailbox.put(token if told is None else told)
        if waker is not None:
            wakers.append(waker)
        if reason is not None:
            return reason
        if mailbox.num_tokens >= self._limit:
            return "length"
        return "pause" if len(mailbox.items) >= MAILBOX_TOKENS else None

    def kept(self, snapshot: Snapshot | None) -> Kept | None:
        """Return where the stream stands, from a snapshot of its row; None if it has none."""
        if snapshot is None:
            return None
        unread = self.prompt[self.num_read :].tolist()
        return Kept(snapshot, (*unread, *(() if self.latest is None else (self.latest,))))

    @property
    def has_room(self) -> bool:
        """Whether its reader has taken enough for it to go on."""
        return len(self.mailbox.items) <= MAILBOX_TOKENS // 2

    def is_due(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.due is not None and now >= self.due

    @property
    def next_due(self) -> float:
        """When the engine has to look at it again; infinite while it need not."""
        stalled = self.stalled_since
        ends = math.inf if stalled is None else stalled + self._reader_timeout
        return ends if self.due is None else min(ends, self.due)


def require_number(logit: float) -> None:
    """Refuse a largest logit that is no finite number.

    Raises:
        InputError: it is not.
    """
    if not math.isfinite(logit):
        raise InputError(
            "no token can be chosen: a logit is not a number, or none is finite; the model's "
            "weights are damaged, or the prompt makes them overflow"
        )
