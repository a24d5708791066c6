"""`lminf eval generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.eval import check_outputs, deliver, output_options
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import session_options
from lminf_export.runtime.options import Provider


@click.command("generate")
@click.argument("bundle", type=click.Path())
@click.option("--prompt", help="The text to continue; the start token alone by default.")
@click.option(
    "--tokens",
    "num_tokens",
    type=int,
    default=100_000,
    show_default=True,
    help="How much to write.",
)
@click.option(
    "--segment", type=int, default=5000, show_default=True, help="Tokens measured together."
)
@click.option("--temperature", type=float, default=0.8, show_default=True)
@click.option("--top-p", type=float, default=0.95, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--reference",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Text people wrote, measured in the same way beside it; repeatable.",
)
@click.option(
    "--save-text", type=click.Path(path_type=Path), metavar="FILE", help="Keep what was written."
)
@session_options
@output_options
@verbosity_options
@handle_errors
def generate_command(
    bundle: str,
    prompt: str | None,
    num_tokens: int,
    segment: int,
    temperature: float,
    top_p: float,
    seed: int,
    reference: tuple[str, ...],
    save_text: Path | None,
    provider: Provider,
    threads: int | None,
    kernels: str,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Let BUNDLE write one long text and measure whether it stays fluent.

    For each segment: perplexity under the model itself, distinct n-grams, the share of tokens
    that were among the 128 before them, and the longest run that occurs twice.
    """
    from lminf_export.evaluate.fluency import evaluate_generation

    check_outputs(out, plot)
    check_outputs(save_text, None)
    with progress_bar() as progress:
        result, text = evaluate_generation(
            bundle,
            prompt,
            num_tokens=num_tokens,
            segment=segment,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            reference=reference,
            provider=provider,
            threads=threads,
            kernels=kernels,
            progress=progress,
        )
    if save_text is not None:
        save_text.write_text(text, encoding="utf-8")
    deliver(result, as_json=as_json, out=out, plot=plot, draw=_draw, print_table=_print_table)


def _draw(result: dict[str, Any], picture: Path) -> None:
    from lminf_export.evaluate.plots import plot_generation

    plot_generation(result, picture)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result['model']}: {result['tokens']} tokens in one stream, temperature "
        f"{result['temperature']:g}, top-p {result['top_p']:g}",
        title_justify="left",
    )
    names = ("tokens", "perplexity", "distinct-1", "distinct-2", "distinct-4", "near repetition")
    for name in (*names, "longest repeat"):
        table.add_column(name, justify="right")
    for row in result["segments"]:
        table.add_row(f"{row['from']:,} – {row['to']:,}", *_cells(row))
    if result["reference"]:
        table.add_section()
        for row in result["reference"]["segments"]:
            table.add_row(f"held out {row['from']:,} – {row['to']:,}", *_cells(row))
    Console(highlight=False, width=max(100, Console().width)).print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    shares = row["distinct"]
    return [
        f"{row['perplexity']:.2f} ±{(row['high'] - row['low']) / 2:.2f}",
        f"{shares['1']:.3f}",
        f"{shares['2']:.3f}",
        f"{shares['4']:.3f}",
        f"{row['near_repetition']:.3f}",
        str(row["longest_repeat"]),
    ]
