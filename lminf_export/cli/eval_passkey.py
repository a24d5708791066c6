"""`lminf eval passkey`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.eval import check_outputs, deliver, output_options
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import session_options
from lminf_export.errors import InputError
from lminf_export.runtime.options import Provider


@click.command("passkey")
@click.argument("bundle", type=click.Path())
@click.option(
    "--lengths",
    default="0.5,1,2,4,8,16",
    show_default=True,
    metavar="LIST",
    help="Lengths of the text, in windows.",
)
@click.option(
    "--depths",
    default="0,10,25,50,75,90,100",
    show_default=True,
    metavar="LIST",
    help="Where the key is, in percent: 0 right behind the header, 100 before the question.",
)
@click.option(
    "--trials", type=int, default=20, show_default=True, help="Keys for each length and depth."
)
@click.option(
    "--distractors",
    type=int,
    default=9,
    show_default=True,
    help="Other keys the right one is ranked among, by likelihood.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@session_options
@output_options
@verbosity_options
@handle_errors
def passkey_command(
    bundle: str,
    lengths: str,
    depths: str,
    trials: int,
    distractors: int,
    seed: int,
    provider: Provider,
    threads: int | None,
    kernels: str,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Hide a key in filler text and ask BUNDLE for it, by length and depth.

    Two measures: the exact answer, greedily; and whether the right key is the likeliest among
    distractors, which a model that follows no instructions can show, too. A bounded cache holds
    the window and the sink tokens: a key that has left both is gone.
    """
    from lminf_export.evaluate.passkey import evaluate_passkey

    check_outputs(out, plot)
    with progress_bar() as progress:
        result = evaluate_passkey(
            bundle,
            factors=_numbers("--lengths", lengths),
            depths=[depth / 100 for depth in _numbers("--depths", depths)],
            trials=trials,
            distractors=distractors,
            seed=seed,
            provider=provider,
            threads=threads,
            kernels=kernels,
            progress=progress,
        )
    deliver(result, as_json=as_json, out=out, plot=plot, draw=_draw, print_table=_print_table)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{option} {text!r}: must be numbers separated by commas") from None


def _draw(result: dict[str, Any], picture: Path) -> None:
    from lminf_export.evaluate.plots import plot_passkey

    plot_passkey(result, picture)


def _print_table(result: dict[str, Any]) -> None:
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
