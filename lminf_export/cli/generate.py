"""`lminf generate`: text in, text out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.cli.common import handle_errors, not_utf8, read_text, verbosity_options
from lminf_export.cli.session_options import (
    kernels_option,
    provider_option,
    threads_option,
    trust_options,
)
from lminf_export.errors import InputError


@dataclass
class Clock:
    """When tokens came, for --stats."""

    started: float
    first: float = 0.0
    last: float = 0.0
    count: int = 0

    def watch(self, token_ids: Iterator[int]) -> Iterator[int]:
        """Pass tokens on and count them."""
        for token in token_ids:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.count += 1
            yield token

    def line(self, num_prompt_tokens: int, nbytes: int, max_nbytes: int) -> str:
        """Return the statistics in one line."""
        decoding = self.last - self.first
        rate = f"{(self.count - 1) / decoding:.1f} tokens/s" if decoding else "one token"
        waited = f"{self.first - self.started:.2f} s" if self.count else "none"
        return (
            f"prompt {num_prompt_tokens} tokens, first token after {waited}, "
            f"{self.count} tokens at {rate}, "
            f"cache {human_bytes(nbytes)} of at most {human_bytes(max_nbytes)}"
        )


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
    default=256,
    show_default=True,
    help="Tokens to write at most.",
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
@trust_options
@click.option("--verify", is_flag=True, help="Hash every file first, weights too.")
@click.option("--stats", is_flag=True, help="Print speed and cache size to stderr at the end.")
@verbosity_options
@handle_errors
def generate_command(
    bundle: str,
    stdin: str | None,
    prompt: str | None,
    prompt_file: str | None,
    max_new_tokens: int,
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
    trust_plan: bool | str,
) -> None:
    """Continue a text with the model in BUNDLE.

    The text comes from --prompt, --prompt-file, or stdin with a last argument "-". What the
    model writes streams to stdout; the cache stays bounded however long it goes on.
    """
    from lminf_export.runtime.load import load

    text = _prompt_text(prompt, prompt_file, stdin)
    started = time.perf_counter()
    model = load(
        bundle,
        provider=provider,  # type: ignore[arg-type]
        threads=threads,
        cuda_graphs=not no_cuda_graphs,
        kernels=kernels,
        verify="full" if verify else "fast",
        trust_plan=trust_plan,
    )
    prompt_ids = model.codec.encode(text)
    state = model.new_state()
    token_ids = model.generate(
        prompt_ids,
        max_new_tokens=None if endless else max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_token_ids=() if ignore_eos else None,
        state=state,
    )
    clock = Clock(started)
    for piece in model.codec.stream(clock.watch(token_ids), after=prompt_ids, stop=stop):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
    if stats:
        click.echo(clock.line(len(prompt_ids), state.nbytes, state.max_nbytes), err=True)


def _prompt_text(prompt: str | None, prompt_file: str | None, stdin: str | None) -> str:
    given = [source for source in (prompt, prompt_file, stdin) if source is not None]
    if len(given) != 1:
        raise InputError("give the text once: --prompt TEXT, --prompt-file FILE, or - for stdin")
    if prompt is not None:
        return prompt
    try:
        if given == ["-"]:
            return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(not_utf8("the prompt on stdin", error)) from None
    assert prompt_file is not None
    return read_text(prompt_file)
