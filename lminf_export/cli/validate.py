"""`lminf validate`: does a bundle compute what the specification says?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lminf_export.cli.common import (
    handle_errors,
    one_adapter,
    quiet_transformers,
    read_text,
    verbosity_options,
)
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import (
    kernels_option,
    provider_option,
    trust_code_option,
    trusted_first,
)
from lminf_export.cli.terminal import echo_json
from lminf_export.runtime.options import Provider
from lminf_export.verify.options import DEFAULT_MAX_HOURS

if TYPE_CHECKING:
    from lminf_export.verify.report import ValidationReport

EXIT_BEYOND_TOLERANCE = 1
HELDOUT_NAME = "heldout.txt"


@click.command("validate")
@click.argument("bundle", type=click.Path())
@click.option(
    "--model",
    metavar="ID|DIR|FILE",
    help="Take the reference's weights from this model, not from the bundle; for quantised "
    "weights, measure what quantisation costs against it.",
)
@click.option(
    "--lora",
    multiple=True,
    metavar="DIR",
    callback=one_adapter,
    help="The adapter merged into the bundle, to be merged into --model too.",
)
@click.option(
    "--allow-pickle", is_flag=True, help="Read .bin weights of the model. Off by default."
)
@trust_code_option
@click.option(
    "--tokens",
    "num_tokens",
    type=int,
    metavar="T",
    help="Length of the stream.  [default: a little over 4 windows]",
)
@click.option(
    "--window",
    type=int,
    metavar="W",
    help="Largest window of a layer in the test, at most the bundle's own; a smaller one wraps the "
    "rings within fewer tokens.  [default: the bundle's own up to 512 tokens, a smaller one where "
    "that would take long]",
)
@click.option(
    "--text",
    type=click.Path(),
    help="Take the stream from this text, through the bundle's tokenizer; random otherwise.  "
    f"[default for a quantised bundle: {HELDOUT_NAME} in the model's folder, if there is one]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random tokens.")
@provider_option
@kernels_option
@trusted_first
@click.option(
    "--max-hours",
    type=float,
    default=DEFAULT_MAX_HOURS,
    show_default=True,
    metavar="H",
    help="Refuse at once what is expected to take longer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@verbosity_options
@handle_errors
def validate_command(
    bundle: str,
    model: str | None,
    lora: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    num_tokens: int | None,
    window: int | None,
    text: str | None,
    seed: int,
    provider: Provider,
    kernels: str,
    max_hours: float,
    as_json: bool,
) -> None:
    """Run BUNDLE token by token and in uneven chunks, and compare every logit.

    The reference is the model's own code with the written-out mathematics of Λ-attention, in
    float64, which the stream passes layer by layer. Time and memory are estimated first. Exits 1
    if an error is beyond its tolerance.
    """
    from lminf_export.bundle.folder import Bundle
    from lminf_export.runtime.text import TextCodec
    from lminf_export.verify.small_window import tested_window
    from lminf_export.verify.stream import default_length
    from lminf_export.verify.validate import validate

    quiet_transformers()
    with progress_bar() as progress:
        opened, token_ids = Bundle.open(bundle), None
        manifest = opened.manifest
        quantized = manifest.quantization is not None or manifest.kv_cache_dtype is not None
        if text is None and model is not None and quantized:
            heldout = Path(model) / HELDOUT_NAME
            text = str(heldout) if heldout.is_file() else None
        if text is not None:
            token_ids = TextCodec.of(opened).encode(read_text(text))
            # A whole book is no stream to hold against float64.
            tested = tested_window(bundle, opened, window)
            num_tokens = default_length(tested) if num_tokens is None else num_tokens
        report = validate(
            bundle,
            model=model,
            lora=lora,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            window=window,
            num_tokens=num_tokens,
            token_ids=token_ids,
            seed=seed,
            provider=provider,
            kernels=kernels,
            max_hours=max_hours,
            progress=progress,
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        _print_table(report)
    if not report.passed:
        raise SystemExit(EXIT_BEYOND_TOLERANCE)


def _print_table(report: ValidationReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{report.bundle}: {report.dtype} against a {report.reference_dtype} reference, "
        f"window {report.tested_window}; errors relative to the logits' range",
        title_justify="left",
    )
    table.add_column("run")
    for name in ("tokens", "max error", "mean error", "tolerance", "same argmax", ""):
        table.add_column(name, justify="right")
    for row in report.comparisons:
        table.add_row(
            row.name,
            str(row.tokens),
            f"{row.max_error:.1e}",
            f"{row.mean_error:.1e}",
            f"{row.tolerance:.1e}",
            f"{row.argmax_agreement:.2%}",
            "ok" if row.passed else "FAILED",
        )
    Console(highlight=False, width=max(100, Console().width)).print(table)
    if report.differing_weights:
        click.echo(
            f"FAILED: {len(report.differing_weights)} tensors are not those of "
            f"{report.compared_with}: "
            f"{', '.join(report.differing_weights[:3])}"
        )
    elif report.differing_weights is not None:
        made = "" if report.quantization is None else ", quantised"
        click.echo(f"weights: every tensor is that of {report.compared_with}{made}")
    for row, routing in zip(report.comparisons, report.routing, strict=False):
        click.echo(
            f"experts, {row.name}: {routing.differing} of {routing.choices} choices are not the "
            f"reference's, the furthest by {routing.largest_gap:.1e} of a score (a near-tie is up "
            f"to {routing.allowed_gap:.1e}): {'ok' if routing.passed else 'FAILED'}"
        )
    if report.routing:
        click.echo("experts: logits are compared under the bundle's choices")
    _print_rings(report)
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.quantization is not None or report.kv_cache_dtype is not None:
        _print_cost(report)


def _print_rings(report: ValidationReport) -> None:
    for row, rings in zip(report.comparisons, report.rings, strict=False):
        click.echo(
            f"int8 rings, {row.name}: values are up to {rings.largest_gap:.1e} steps off what the "
            f"reference rounds to (a near-tie is up to {rings.allowed_gap:.1e}): "
            f"{'ok' if rings.passed else 'FAILED'}"
        )
    if report.ring_cost is None:
        return
    cost = report.ring_cost
    found = "ok" if cost.passed else "FAILED: leave out --kv-cache-dtype int8 for this model"
    if cost.passed and cost.is_notable:
        found = "ok, but much; --text measures what it costs in perplexity"
    click.echo("int8 rings: logits are compared over the bundle's values")
    click.echo(
        f"rounding the int8 rings moves a logit by {cost.mean_error:.1e} of the range in the mean "
        f"(up to {cost.limit:.0e} passes) and by {cost.max_error:.1e} at most: {found}"
    )


def _print_cost(report: ValidationReport) -> None:
    cache = None if report.kv_cache_dtype is None else f"{report.kv_cache_dtype} cache"
    click.echo(f"quantised: {', '.join(x for x in (report.quantization, cache) if x)}")
    cost = report.perplexity_cost
    if cost is None:
        how = "--text measures it" if report.quantization is None else "--model and --text do it"
        click.echo(f"perplexity cost of quantisation: not measured; {how}")
        return
    click.echo(
        f"perplexity cost of quantisation: {cost.cost:+.2%} ± {cost.standard_error:.2%}, from "
        f"{cost.unquantized:.3f} to {cost.quantized:.3f} over {cost.tokens} tokens"
    )
