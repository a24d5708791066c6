"""`lminf generate`: text in, text out."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from lminf_export.cli.common import (
    handle_errors,
    read_text,
    require_unicode,
    text_of,
    verbosity_options,
)
from lminf_export.cli.follow import follow as follow_stdin
from lminf_export.cli.kept_state import KeptState
from lminf_export.cli.sampling_options import sampling_options, stop_option
from lminf_export.cli.session_options import load_options
from lminf_export.cli.signals import saved_however_it_ends
from lminf_export.cli.written_text import WrittenText
from lminf_export.errors import InputError
from lminf_export.runtime.following import WRITE_AFTER, WriteAfter

DEFAULT_NEW_TOKENS = 256


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
    "--follow",
    is_flag=True,
    help="Read stdin line by line without end, and continue each line; the text of --prompt or "
    "--prompt-file comes first.",
)
@click.option(
    "--write-after",
    type=click.Choice(WRITE_AFTER),
    help="With --follow, write behind each line, its newline, a blank line, or the end of stdin.  "
    "[default: line]",
)
@sampling_options
@stop_option
@click.option(
    "--load-state",
    type=click.Path(),
    metavar="FILE",
    help="Go on where a text ended that was written with --save-state; the prompt may be left out.",
)
@click.option(
    "--save-state",
    type=click.Path(),
    metavar="FILE",
    help="Write the stream's state to a file at the end, after Ctrl-C too.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on behind the model's end-of-text token.")
@load_options
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
    follow: bool,
    write_after: WriteAfter | None,
    sampling: dict[str, Any],
    stop: tuple[str, ...],
    load_state: str | None,
    save_state: str | None,
    ignore_eos: bool,
    loading: dict[str, Any],
    stats: bool,
    as_json: bool,
) -> None:
    """Continue a text with the model in BUNDLE.

    The text comes from --prompt, --prompt-file, or stdin with a last argument "-". What the
    model writes streams to stdout; the cache stays bounded however long it goes on. With --follow
    it comes from stdin line by line, for as long as there are lines. With
    --load-state the text goes on behind one that was saved.
    """
    from lminf_export.runtime.load import load
    from lminf_export.runtime.text import StreamText

    limit = _limit(max_new_tokens, endless, as_json)
    if follow and (endless or as_json):
        raise InputError("--follow writes line by line; it takes neither --endless nor --json")
    if write_after is not None and not follow:
        raise InputError("--write-after says where --follow writes; give both")
    prompt_text: str | None
    if follow:
        prompt_text = _text_before(prompt, prompt_file, stdin)
    else:
        prompt_text = _prompt_text(prompt, prompt_file, stdin, optional=load_state is not None)
    started = time.perf_counter()
    model = load(bundle, **loading)
    if follow:
        follow_stdin(
            model,
            prompt_text or "",
            write_after or "line",
            load_state=load_state,
            save_state=save_state,
            stats=stats,
            stop=stop,
            max_new_tokens=limit,
            stop_token_ids=() if ignore_eos else None,
            **sampling,
        )
        return
    kept = KeptState(model, load_state, save_state)
    kept.begin(prompt_text)
    if limit == 0:
        kept.read_prompt()
    token_ids = model.generate(
        kept.prompt_ids,
        max_new_tokens=limit,
        stop_token_ids=() if ignore_eos else None,
        state=kept.state,
        **sampling,
    )
    shown = StreamText(model.codec, kept.before, stop, begins_open=load_state is not None)
    text = WrittenText(limit, started, kept, shown, as_json, stats)
    saved_however_it_ends(lambda: text.write(kept.watch(token_ids)), text.save, text.interrupt)
    text.finish()


def _limit(max_new_tokens: int | None, endless: bool, as_json: bool) -> int | None:
    """Return the number of tokens to write at most, None for no end."""
    if not endless:
        return DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if max_new_tokens is not None:
        raise InputError("--endless has no --max-new-tokens; give one of them")
    if as_json:
        raise InputError("--json prints at the end, and --endless has none; give --max-new-tokens")
    return None


def _text_before(prompt: str | None, prompt_file: str | None, stdin: str | None) -> str:
    """Return the text before the first line of a stream."""
    if stdin is not None or prompt_file == "-":
        raise InputError("--follow reads stdin already; the text before it is --prompt TEXT")
    return _prompt_text(prompt, prompt_file, None, optional=True) or ""


def _prompt_text(
    prompt: str | None, prompt_file: str | None, stdin: str | None, *, optional: bool
) -> str | None:
    given = [source for source in (prompt, prompt_file, stdin) if source is not None]
    if optional and not given:
        return None
    if len(given) != 1:
        raise InputError("give the text once: --prompt TEXT, --prompt-file FILE, or - for stdin")
    if prompt is not None:
        return require_unicode("--prompt", prompt)
    if given == ["-"]:
        return text_of(sys.stdin.buffer, "the prompt on stdin")
    assert prompt_file is not None
    return read_text(prompt_file)
