"""`lminf eval perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lminf_export.cli.common import handle_errors, quiet_transformers, verbosity_options
from lminf_export.cli.eval import check_outputs, deliver, output_options
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import session_options, trust_code_option
from lminf_export.cli.signals import when_interrupted
from lminf_export.errors import InputError
from lminf_export.runtime.options import Provider


@click.command("perplexity")
@click.argument("bundle", type=click.Path())
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(),
    metavar="FILE",
    help="UTF-8 text to read; repeat the option for more, read one after the other.",
)
@click.option("--max-tokens", type=int, metavar="T", help="Stop after T tokens.")
@click.option("--repeat", is_flag=True, help="Read the text again and again until --max-tokens.")
@click.option(
    "--no-start-token",
    "start_tokens",
    flag_value=False,
    default=True,
    help="Leave out the start token the tokenizer would put first.",
)
@click.option(
    "--compare",
    default="",
    metavar="NAMES",
    help="Run these beside it on the same tokens, in torch, from the bundle's own weights: any "
    "of stock,window,streaming,recompute,reference.",
)
@click.option(
    "--model", metavar="ID|DIR|FILE", help="Take the comparisons' weights from this model instead."
)
@trust_code_option
@click.option(
    "--budget",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Time each comparison may take; it is cut off there.",
)
@click.option(
    "--targets",
    type=int,
    default=2000,
    show_default=True,
    help="Sampled targets of each bucket for --compare recompute.",
)
@click.option(
    "--per-octave",
    type=int,
    default=1,
    show_default=True,
    help="Buckets for each doubling of the context.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampled targets.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep what is done in this file; the same command goes on from it.",
)
@session_options
@output_options
@verbosity_options
@handle_errors
def perplexity_command(
    bundle: str,
    texts: tuple[str, ...],
    max_tokens: int | None,
    repeat: bool,
    start_tokens: bool,
    compare: str,
    model: str | None,
    trust_remote_code: bool,
    budget: float,
    targets: int,
    per_octave: int,
    seed: int,
    state: Path | None,
    provider: Provider,
    threads: int | None,
    kernels: str,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Stream texts through BUNDLE and print how well it predicts them, by context length.

    The text runs through the exported model in chunks, with a cache that never grows, however
    long it is. Perplexities come with 95 % bootstrap intervals over runs of 64 tokens. What is
    compared with it sees the same tokens.
    """
    from lminf_export.evaluate.perplexity import evaluate_perplexity
    from lminf_export.evaluate.perplexity_options import Options
    from lminf_export.evaluate.perplexity_reading import SAVE_SECONDS

    quiet_transformers()
    check_outputs(out, plot)
    if state is not None and not state.absolute().parent.is_dir():
        raise InputError(f"{state.parent} does not exist; make it or name another folder")
    options = Options(
        compare=tuple(name.strip() for name in compare.split(",") if name.strip()),
        model=model,
        trust_remote_code=trust_remote_code,
        targets=targets,
        budget_seconds=budget,
        buckets_per_octave=per_octave,
        seed=seed,
    )

    def kept() -> str:
        if state is None:
            return "nothing is kept; --state FILE keeps what is done"
        if not state.exists():
            return f"nothing is kept yet; {state} is written every {SAVE_SECONDS:.0f} s"
        return (
            f"{state} holds what was done until the last save, every {SAVE_SECONDS:.0f} s; the "
            "same command goes on from it"
        )

    with when_interrupted(kept), progress_bar() as progress:
        result = evaluate_perplexity(
            bundle,
            texts,
            max_tokens=max_tokens,
            repeat=repeat,
            start_tokens=start_tokens,
            options=options,
            state_file=state,
            provider=provider,
            threads=threads,
            kernels=kernels,
            progress=progress,
        )
    deliver(result, as_json=as_json, out=out, plot=plot, draw=_draw, print_table=_print_table)


def _draw(result: dict[str, Any], picture: Path) -> None:
    from lminf_export.evaluate.plots import plot_perplexity

    plot_perplexity(result, picture)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = result["lambda_config"]
    length = result["training_length"]
    methods = result["methods"]
    table = Table(
        title=f"{result['model']}: perplexity of {result['tokens']} tokens; trained on "
        f"{length or 'an unknown length'}, window {settings['window_size']}, "
        f"{settings['num_sink_tokens']} sink tokens",
        title_justify="left",
        caption="±: half of the 95 % interval; in brackets Λ's perplexity over it, same targets",
    )
    table.add_column("tokens before", justify="right")
    for name in methods:
        table.add_column("Λ" if name == "lambda" else name, justify="right")
    for index, (low, high) in enumerate(result["buckets"]):
        cells = [_cell(method["by_bucket"][index]) for method in methods.values()]
        table.add_row(f"{low:,} – {high:,}", *cells)
    table.add_section()
    table.add_row("all", *(_cell(method["perplexity"]) for method in methods.values()))
    Console(highlight=False, width=max(100, Console().width)).print(table)
    for name, method in methods.items():
        rate = method["tokens_read"] / method["seconds"] if method["seconds"] else 0.0
        ended = f", stopped: {method['stopped']}" if method["stopped"] else ""
        click.echo(
            f"{'Λ' if name == 'lambda' else name}: {method['label']}; "
            f"{method['tokens_read']} tokens, {rate:,.0f} tokens/s{ended}"
        )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    shares = row.get("lambda_over_this")
    if shares:
        return f"{row['perplexity']:.2f} ({shares['ratio']:.3f})"
    return f"{row['perplexity']:.2f} ±{(row['high'] - row['low']) / 2:.2f}"
