"""`lminf eval`: what a bundle does with long texts, measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lminf_export.cli.common import LazyGroup
from lminf_export.cli.terminal import echo_json
from lminf_export.errors import InputError

_COMMANDS = {
    "perplexity": (
        "lminf_export.cli.eval_perplexity:perplexity_command",
        "How well a bundle predicts a text of any length, by context length.",
    ),
    "passkey": (
        "lminf_export.cli.eval_passkey:passkey_command",
        "Whether a key hidden in a text is found again, by length and depth.",
    ),
    "lookup": (
        "lminf_export.cli.eval_lookup:lookup_command",
        "Whether the code of a name is found in a list of many, by length and depth.",
    ),
    "generate": (
        "lminf_export.cli.eval_generate:generate_command",
        "Whether a long text the bundle writes stays fluent.",
    ),
}


@click.group(
    "eval",
    cls=LazyGroup,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def eval_group() -> None:
    """Measure what a bundle does with long texts."""


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, --out and --plot."""
    for option in (
        click.option(
            "--plot", type=click.Path(path_type=Path), metavar="FILE",
            help="Draw the result into this picture, such as out.png; needs matplotlib.",
        ),
        click.option(
            "--out", type=click.Path(path_type=Path), metavar="FILE",
            help="Write the result to this file as JSON.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):  # fmt: skip
        function = option(function)
    return function


def check_outputs(out: Path | None, plot: Path | None) -> None:
    """Find out before the work whether its results can be written.

    Raises:
        InputError: a folder is missing or closed, or the picture cannot be drawn.
    """
    for path in (out, plot):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file")
        if not path.parent.is_dir():
            raise InputError(f"{path.parent} does not exist; make it or name another folder")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path.parent} cannot be written to")
    if plot is not None:
        from lminf_export.evaluate.plots import require_plotting

        require_plotting(plot)


def deliver(
    result: dict[str, Any],
    *,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
    draw: Callable[[dict[str, Any], Path], None],
    print_table: Callable[[dict[str, Any]], None],
) -> None:
    """Put a result where the options of `output_options` want it: file, picture, screen.

    Args:
        result: as JSON can hold it.
        as_json: print JSON instead of a table.
        out: where JSON is written to.
        plot: where the picture is drawn into.
        draw: draws it.
        print_table: prints it for people.
    """
    if out is not None:
        write_json(result, out)
    if plot is not None:
        draw(result, plot)
    if as_json:
        echo_json(result)
    else:
        print_table(result)


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result beside its place, then put it there."""
    fresh = path.with_name(f".new-{path.name}")
    try:
        fresh.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
