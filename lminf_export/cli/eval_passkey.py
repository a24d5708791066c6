"""`lminf eval passkey`."""

from __future__ import annotations

from pathlib import Path

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.eval import check_outputs, deliver, output_options
from lminf_export.cli.eval_retrieval import draw_task, print_task, task_options, task_settings
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import session_options
from lminf_export.runtime.options import Provider


@click.command("passkey")
@click.argument("bundle", type=click.Path())
@task_options
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
