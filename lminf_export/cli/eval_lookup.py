"""`lminf eval lookup`."""

from __future__ import annotations

from pathlib import Path

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.eval import check_outputs, deliver, output_options
from lminf_export.cli.eval_retrieval import draw_task, print_task, task_options, task_settings
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import session_options
from lminf_export.runtime.options import Provider


@click.command("lookup")
@click.argument("bundle", type=click.Path())
@task_options
@session_options
@output_options
@verbosity_options
@handle_errors
def lookup_command(
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
    """Give BUNDLE a list of names and codes and ask for one code, by length and depth.

    Harder than the passkey task: all records look alike, and the wrong answers the right one is
    ranked among are codes of the same list. Measures as in `lminf eval passkey`.
    """
    from lminf_export.evaluate.lookup import evaluate_lookup

    check_outputs(out, plot)
    with progress_bar() as progress:
        result = evaluate_lookup(
            bundle,
            **task_settings(lengths, depths),
            trials=trials,
            distractors=distractors,
            seed=seed,
            provider=provider,
            threads=threads,
            kernels=kernels,
            progress=progress,
        )
    deliver(result, as_json=as_json, out=out, plot=plot, draw=draw_task, print_table=print_task)
