"""`lminf generate --follow`: stdin is a stream of lines without end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.cli.signals import saved_however_it_ends
from lminf_export.cli.terminal import end_stdout

if TYPE_CHECKING:
    from lminf_export.runtime.following import WriteAfter
    from lminf_export.runtime.language_model import LanguageModel


def follow(
    model: LanguageModel,
    prompt: str,
    write_after: WriteAfter,
    *,
    load_state: str | None,
    save_state: str | None,
    stats: bool,
    stop: tuple[str, ...],
    **settings: Any,
) -> None:
    """Read stdin line by line, write where it is time, and end when it ends.

    Args:
        model: the model.
        prompt: text before the first line.
        write_after: see `Following`.
        load_state: file of a stream to go on with, None for none.
        save_state: file that the stream is written to at the end, None for none.
        stats: print lines, tokens and cache to stderr at the end.
        stop: strings that end what is written.
        settings: see `LanguageModel.generate`.
    """
    from lminf_export.runtime.following import Following
    from lminf_export.runtime.state_file import require_place

    if save_state is not None:
        require_place(save_state)
    following = Following(model, prompt, write_after, load=load_state)
    started = time.perf_counter()

    def statistics() -> str:
        stream = following.stream
        return (
            f"{following.num_lines} lines, {stream.position} tokens, {following.num_written} of "
            f"them written, {stream.position / (time.perf_counter() - started):.1f} tokens/s, "
            f"cache {human_bytes(stream.state.nbytes)} of at most "
            f"{human_bytes(stream.state.max_nbytes)}"
        )

    rest = ""

    def save() -> None:
        nonlocal rest
        rest = following.end_writing()
        if save_state is not None:
            following.stream.save(save_state)

    def kept() -> str:
        end_stdout(rest)
        where = "" if save_state is None else f"; the stream is in {save_state}"
        return f"{statistics()}{where}"

    def work() -> None:
        for piece in following.answers(sys.stdin.buffer, stop=stop, **settings):
            click.echo(piece, nl=False)
            sys.stdout.flush()

    saved_however_it_ends(work, save, kept)
    if stats:
        click.echo(statistics(), err=True)
