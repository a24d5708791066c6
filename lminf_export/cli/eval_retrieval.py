"""Options, table and picture that `lminf eval passkey` and `lminf eval lookup` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lminf_export.errors import InputError


def task_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --lengths, --depths, --trials, --distractors and --seed."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True),
        click.option(
            "--distractors", type=int, default=9, show_default=True,
            help="Wrong answers the right one is ranked among, by likelihood.",
        ),
        click.option(
            "--trials", type=int, default=20, show_default=True,
            help="Texts for each length and depth.",
        ),
        click.option(
            "--depths", default="0,10,25,50,75,90,100", show_default=True, metavar="LIST",
            help="Where the answer is, in percent: 0 right behind the header, 100 before the "
            "question.",
        ),
        click.option(
            "--lengths", default="0.5,1,2,4,8,16", show_default=True, metavar="LIST",
            help="Lengths of the text, in windows.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def task_settings(lengths: str, depths: str) -> dict[str, list[float]]:
    """Return the options that are lists as the evaluations take them.

    Raises:
        InputError: not numbers.
    """
    return {
        "factors": _numbers("--lengths", lengths),
        "depths": [depth / 100 for depth in _numbers("--depths", depths)],
    }


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{option} {text!r}: must be numbers separated by commas") from None


def draw_task(result: dict[str, Any], picture: Path) -> None:
    """Draw a result into a picture."""
    from lminf_export.evaluate.plots import plot_passkey

    plot_passkey(result, picture)


def print_task(result: dict[str, Any]) -> None:
    """Print a result as a table."""
    from rich.console import Console
    from rich.table import Table

    settings = result["lambda_config"]
    table = Table(
        title=f"{result['model']}: exact answers, and in brackets how often the right key is the "
        f"likeliest of {result['candidates']}; window {settings['window_size']}, "
        f"{settings['num_sink_tokens']} sink tokens",
        title_justify="left",
        caption="w: the key is in the window when it is asked for, s: in the sinks, -: evicted",
    )
    table.add_column("windows", justify="right")
    table.add_column("tokens", justify="right")
    cells = result["cells"]
    depths = sorted({cell["depth"] for cell in cells})
    for depth in depths:
        table.add_column(f"{depth:.0%}", justify="right")
    for factor in sorted({cell["windows"] for cell in cells}):
        row = {cell["depth"]: cell for cell in cells if cell["windows"] == factor}
        tokens = sum(cell["tokens"] for cell in row.values()) / len(row)
        table.add_row(f"{factor:g}", f"{tokens:.0f}", *(_cell(row[depth]) for depth in depths))
    Console(highlight=False, width=max(100, Console().width)).print(table)
    click.echo(
        f"{result['trials']} trials each; the widest 95 % interval is "
        f"±{max(c['exact_95'][1] - c['exact_95'][0] for c in cells) / 2:.0%}"
    )


def _cell(cell: dict[str, Any]) -> str:
    place = max(cell["key_is_in"], key=cell["key_is_in"].get)
    mark = {"window": "w", "sinks": "s", "evicted": "-"}[place]
    return f"{cell['exact']:.0%} ({cell['rank_one']:.0%}) {mark}"
