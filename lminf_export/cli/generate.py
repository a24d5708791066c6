"""`lminf generate`: text in, text out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.cli.common import (
    handle_errors,
    not_utf8,
    read_text,
    require_unicode,
    verbosity_options,
)
from lminf_export.cli.session_options import (
    kernels_option,
    provider_option,
    threads_option,
    trust_options,
)
from lminf_export.cli.terminal import echo_json, when_interrupted
from lminf_export.errors import InputError

if TYPE_CHECKING:
    from lminf_export.runtime.cache import State


DEFAULT_NEW_TOKENS = 256


@dataclass
class Run:
    """A text while it is written: when its tokens came, and how it ended.

    Attributes:
        num_prompt_tokens: tokens read.
        max_new_tokens: tokens to write at most; None for no end.
        started: when the command began, of `time.perf_counter`, as the other times.
        first: when the first token came.
        last: when the latest token came.
        count: tokens written.
        ran_out: whether the model gave no more tokens.
        keep_ids: whether to keep the tokens.
        token_ids: those kept.
    """

    num_prompt_tokens: int
    max_new_tokens: int | None
    started: float
    first: float = 0.0
    last: float = 0.0
    count: int = 0
    ran_out: bool = False
    keep_ids: bool = False
    token_ids: list[int] = field(default_factory=list)

    def watch(self, token_ids: Iterator[int]) -> Iterator[int]:
        """Pass tokens on and count them."""
        for token in token_ids:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.count += 1
            if self.keep_ids:
                self.token_ids.append(token)
            yield token
        self.ran_out = True

    @property
    def finish_reason(self) -> str:
        """Why the text ended: "length", "end_of_text" (the model's own end) or "stop_text"."""
        if not self.ran_out:
            return "stop_text"
        return "length" if self.count == self.max_new_tokens else "end_of_text"

    @property
    def tokens_per_second(self) -> float | None:
        """Speed from the first token to the latest; None for fewer than two."""
        return (self.count - 1) / (self.last - self.first) if self.last > self.first else None

    def line(self, state: State) -> str:
        """Return the statistics in one line."""
        speed = self.tokens_per_second
        rate = f"{speed:.1f} tokens/s" if speed else "one token"
        waited = f"{self.first - self.started:.2f} s" if self.count else "none"
        return (
            f"prompt {self.num_prompt_tokens} tokens, first token after {waited}, "
            f"{self.count} tokens at {rate}, "
            f"cache {human_bytes(state.nbytes)} of at most {human_bytes(state.max_nbytes)}"
        )

    def to_dict(self, text: str, finish_reason: str, state: State) -> dict[str, Any]:
        """Return the result as JSON can hold it."""
        return {
            "text": text,
            "token_ids": self.token_ids,
            "finish_reason": finish_reason,
            "prompt_tokens": self.num_prompt_tokens,
            "new_tokens": self.count,
            "seconds_to_first_token": self.first - self.started if self.count else None,
            "tokens_per_second": self.tokens_per_second,
            "cache_bytes": state.nbytes,
            "max_cache_bytes": state.max_nbytes,
        }


@click.command("generate")
@click.argument("bundle", type=click.Path())
@click.argument("stdin", required=False, type=click.Choice(["-"]), metavar="[-]")
@click.option("--prompt", help="The text to continue.")
@click.option(
    "--prompt-file", type=click.Path(), help="Read the text from a UTF-8 file; - is stdin."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=0),
    help=f"Tokens to write at most.  [default: {DEFAULT_NEW_TOKENS}]",
)
@click.option("--endless", is_flag=True, help="Write until you stop it.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Divides the logits; 0 takes the likeliest token.",
)
@click.option(
    "--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest; 0: all."
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Keep the likeliest tokens that together reach this probability.",
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Drop tokens less likely than this share of the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1: make tokens seen within the window less likely.",
)
@click.option("--seed", type=int, help="Draw the same text again.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on behind the model's end-of-text token.")
@provider_option
@click.option(
    "--no-cuda-graphs", is_flag=True, help="Enqueue every step of a plan instead of recording one."
)
@kernels_option
@threads_option
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a bundle on the hub.")
@trust_options
@click.option("--verify", is_flag=True, help="Hash every file first, weights too.")
@click.option(
    "--stats",
    is_flag=True,
    help="Print speed and cache size to stderr at the end, after Ctrl-C too.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print text, token ids and speed as JSON, at the end."
)
@verbosity_options
@handle_errors
def generate_command(
    bundle: str,
    stdin: str | None,
    prompt: str | None,
    prompt_file: str | None,
    max_new_tokens: int | None,
    endless: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    provider: str,
    no_cuda_graphs: bool,
    kernels: str,
    threads: int | None,
    verify: bool,
    stats: bool,
    revision: str | None,
    trust_plan: bool | str,
    as_json: bool,
) -> None:
    """Continue a text with the model in BUNDLE.

    The text comes from --prompt, --prompt-file, or stdin with a last argument "-". What the
    model writes streams to stdout; the cache stays bounded however long it goes on.
    """
    from lminf_export.runtime.load import load

    limit = _limit(max_new_tokens, endless, as_json)
    prompt_text = _prompt_text(prompt, prompt_file, stdin)
    started = time.perf_counter()
    model = load(
        bundle,
        provider=provider,  # type: ignore[arg-type]
        threads=threads,
        cuda_graphs=not no_cuda_graphs,
        kernels=kernels,
        verify="full" if verify else "fast",
        trust_plan=trust_plan,
        revision=revision,
    )
    prompt_ids = model.codec.encode(prompt_text)
    state = model.new_state()
    token_ids = model.generate(
        prompt_ids,
        max_new_tokens=limit,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_token_ids=() if ignore_eos else None,
        state=state,
    )
    run = Run(len(prompt_ids), limit, started, keep_ids=as_json)
    pieces: list[str] = []

    def finish(reason: str) -> None:
        if as_json:
            echo_json(run.to_dict("".join(pieces), reason, state))
        else:
            click.echo()
        if stats:
            click.echo(run.line(state), err=True)

    def kept() -> str:
        finish("interrupted")
        return f"the {run.count} tokens written so far are above; no state is kept"

    with when_interrupted(kept):
        for piece in model.codec.stream(run.watch(token_ids), after=prompt_ids, stop=stop):
            if as_json:
                pieces.append(piece)
            else:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    finish(run.finish_reason)


def _limit(max_new_tokens: int | None, endless: bool, as_json: bool) -> int | None:
    """Return the number of tokens to write at most, None for no end."""
    if not endless:
        return DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if max_new_tokens is not None:
        raise InputError("--endless has no --max-new-tokens; give one of them")
    if as_json:
        raise InputError("--json prints at the end, and --endless has none; give --max-new-tokens")
    return None


def _prompt_text(prompt: str | None, prompt_file: str | None, stdin: str | None) -> str:
    given = [source for source in (prompt, prompt_file, stdin) if source is not None]
    if len(given) != 1:
        raise InputError("give the text once: --prompt TEXT, --prompt-file FILE, or - for stdin")
    if prompt is not None:
        return require_unicode("--prompt", prompt)
    try:
        if given == ["-"]:
            return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(not_utf8("the prompt on stdin", error)) from None
    assert prompt_file is not None
    return read_text(prompt_file)
