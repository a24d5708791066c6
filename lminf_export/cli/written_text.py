"""A text while a command writes it: printed as it comes, its tokens timed, its end explained."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.cli.terminal import echo_json, end_stdout, json_text, say_if_heard

if TYPE_CHECKING:
    from lminf_export.cli.kept_state import KeptState
    from lminf_export.runtime.text import StreamText

INTERRUPTED = "interrupted"


@dataclass
class WrittenText:
    """A text while it is written.

    Attributes:
        max_new_tokens: tokens to write at most; None for no end.
        started: when the command began, of `time.perf_counter`, as the other times.
        kept: the stream.
        shown: its text, as far as it is certain.
        as_json: keep text and tokens and print them at the end, in place of text as it comes.
        stats: print speed and cache at the end, to stderr.
        first: when the first token came.
        last: when the latest token came.
        count: tokens written.
        ran_out: whether the model gave no more tokens.
        token_ids: the tokens, where JSON is wanted.
        pieces: the text, where JSON is wanted.
        state_bytes: of the file with the stream's state; None before it is written.
    """

    max_new_tokens: int | None
    started: float
    kept: KeptState
    shown: StreamText
    as_json: bool
    stats: bool
    first: float = 0.0
    last: float = 0.0
    count: int = 0
    ran_out: bool = False
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    state_bytes: int | None = None

    def write(self, token_ids: Iterator[int]) -> None:
        """Print text as tokens come, up to a stop string or their end."""
        for token in token_ids:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.count += 1
            if self.as_json:
                self.token_ids.append(token)
            self._show(self.shown.push(token))
            if self.shown.found is not None:
                return
        self.ran_out = True

    def _show(self, piece: str) -> None:
        if self.as_json:
            self.pieces.append(piece)
        elif piece:
            click.echo(piece, nl=False)
            sys.stdout.flush()

    def save(self) -> None:
        """Write the stream's state, if it is to be kept."""
        self.state_bytes = self.kept.save()

    def finish(self) -> None:
        """Print what comes behind the text."""
        self._show(self._rest())
        if self.as_json:
            echo_json(self._result(self._reason))
        else:
            click.echo()
        if self.stats:
            click.echo(self._statistics, err=True)

    def interrupt(self) -> str:
        """Print what comes behind an interrupted text; return a line that says what is kept."""
        rest = self._rest()
        if self.as_json:
            self.pieces.append(rest)
            rest = json_text(self._result(INTERRUPTED))
        end_stdout(f"{rest}\n")
        if self.stats:
            say_if_heard(self._statistics)
        end = "no state is kept" if self.state_bytes is None else "the state is saved"
        return f"the {self._num_written} written so far are above; {end}"

    def _rest(self) -> str:
        """Return the text held back; a character that is not complete waits in a saved state."""
        return self.shown.finish(ends_open=self.state_bytes is not None)

    @property
    def _reason(self) -> str:
        if not self.ran_out:
            return "stop_text"
        return "length" if self.count == self.max_new_tokens else "end_of_text"

    @property
    def _tokens_per_second(self) -> float | None:
        """Speed from the first token to the latest; None for fewer than two."""
        return (self.count - 1) / (self.last - self.first) if self.last > self.first else None

    @property
    def _num_written(self) -> str:
        return f"{self.count} {'token' if self.count == 1 else 'tokens'}"

    @property
    def _statistics(self) -> str:
        speed = self._tokens_per_second
        saved = "" if self.state_bytes is None else f", state {human_bytes(self.state_bytes)}"
        waited = f"{self.first - self.started:.2f} s" if self.count else "none"
        return (
            f"prompt {len(self.kept.prompt_ids)} tokens, first token after {waited}, "
            f"{self._num_written}{f' at {speed:.1f} tokens/s' if speed else ''}, "
            f"cache {human_bytes(self.kept.state.nbytes)} of at most "
            f"{human_bytes(self.kept.state.max_nbytes)}{saved}"
        )

    def _result(self, finish_reason: str) -> dict[str, Any]:
        return {
            "text": "".join(self.pieces),
            "token_ids": self.token_ids,
            "finish_reason": finish_reason,
            "prompt_tokens": len(self.kept.prompt_ids),
            "new_tokens": self.count,
            "seconds_to_first_token": self.first - self.started if self.count else None,
            "tokens_per_second": self._tokens_per_second,
            "cache_bytes": self.kept.state.nbytes,
            "max_cache_bytes": self.kept.state.max_nbytes,
            "state_bytes": self.state_bytes,
        }
