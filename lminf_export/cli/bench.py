"""`lminf bench`: how fast a bundle runs here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import kernels_option, provider_option, threads_option
from lminf_export.cli.terminal import echo_json
from lminf_export.errors import InputError
from lminf_export.runtime.options import Provider

if TYPE_CHECKING:
    from rich.table import Table

    from lminf_export.bench.report import BenchReport


def _numbers(_: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part.replace("_", "")) for part in text.split(",")) if text else ()
    except ValueError:
        message = f"{text!r}: expected numbers with commas between them, such as 1,4"
        raise click.BadParameter(message, param=option) from None


@click.command("bench")
@click.argument("bundle", type=click.Path())
@click.option(
    "--batch-sizes",
    default="1,4",
    show_default=True,
    callback=_numbers,
    metavar="B,…",
    help="Streams side by side.",
)
@click.option(
    "--positions",
    callback=_numbers,
    metavar="P,…",
    help="Where decoding is measured.  [default: 1, 8 and 64 windows, and 1000000]",
)
@click.option(
    "--prefill-tokens", type=int, default=2048, show_default=True, help="Length of the prompt."
)
@click.option(
    "--decode-tokens", type=int, default=60, show_default=True, help="Steps timed at a position."
)
@threads_option
@provider_option
@kernels_option
@click.option("--profile", is_flag=True, help="Show where decoding spends its time, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@verbosity_options
@handle_errors
def bench_command(
    bundle: str,
    batch_sizes: tuple[int, ...],
    positions: tuple[int, ...],
    prefill_tokens: int,
    decode_tokens: int,
    threads: int | None,
    provider: Provider,
    kernels: str,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure BUNDLE on this machine: prefill, first token, decoding, memory.

    Decoding is compared with its floor: the time to stream the weights and the live cache from
    memory once, at the bandwidth found in the same run. Decoding positions are set, not read:
    the rings hold random numbers, which cost what real keys cost.

    BUNDLE may be a plan, DIR/engine.plan: TensorRT runs it on this machine's GPU, and the report
    says whether its caches were updated in place.
    """
    from lminf_export.bench.measure import BenchOptions, bench

    if not batch_sizes:
        raise InputError("--batch-sizes: give at least one")
    options = BenchOptions(
        batch_sizes=batch_sizes,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        provider=provider,
        kernels=kernels,
        threads=threads,
        profile=profile,
        positions=positions,
    )
    with progress_bar() as progress:
        report = bench(bundle, options, progress)
    if as_json:
        echo_json(report.to_dict())
    else:
        _print_tables(report)


def _print_tables(report: BenchReport) -> None:
    from rich.console import Console

    console = Console(highlight=False, width=max(100, Console().width))
    for table in (_facts(report), _decode_table(report), _profile_table(report)):
        if table is not None:
            console.print(table)
    console.print(
        "floor: weights and live cache bytes streamed once; positions are set, rings hold random "
        "numbers"
    )


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def _facts(report: BenchReport) -> Table:
    first, memory, outside = report.first_token, report.memory, report.outside_run
    cache = f"{report.kv_cache_dtype} cache" if report.kv_cache_dtype else None
    kind = ", ".join(x for x in (report.dtype, report.quantization, cache) if x)
    threads = "onnxruntime's choice" if report.threads is None else str(report.threads)
    table = _table(f"{report.bundle}: {report.model_type}, {kind}", "what", "value")
    rows: list[tuple[str, Any]] = [
        ("threads", threads),
        ("attention", report.attention),
        *([("CUDA graph", report.cuda_graph)] if report.cuda_graph else []),
        *([("caches", report.cache_updates)] if report.cache_updates is not None else []),
        ("streaming bandwidth", f"{report.bandwidth / 1e9:.1f} GB/s"),
        *(
            (
                f"prefill, batch {row.batch_size}",
                f"{row.tokens_per_second:.0f} tokens/s ({row.tokens} tokens each)",
            )
            for row in report.prefill
        ),
        (
            "outside the engine's run, a token",
            f"{outside.forward * 1e6:.0f} µs read, {outside.greedy * 1e6:.0f} µs made, "
            f"{outside.sampled * 1e6:.0f} µs drawn",
        ),
        ("load to first token", f"{first.load_to_first_token:.2f} s"),
        ("fresh process to first token", f"{first.process:.2f} s"),
        ("reading the weights once", f"{first.map_weights:.2f} s"),
        ("memory of its own, rings full", human_bytes(memory.anonymous)),
        ("of that, before loading", human_bytes(memory.imports_anonymous)),
        ("memory with mapped weights", human_bytes(memory.total)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _decode_table(report: BenchReport) -> Table:
    table = _table("decoding", "position", "batch", "ms a step", "tokens/s", "±", "floor", "ratio")
    for row in report.decode:
        place = f"{row.windows}× window" if row.windows else ""
        table.add_row(
            f"{row.position:,} {place}".strip(),
            str(row.batch_size),
            f"{row.ms_per_step:.2f}",
            f"{row.batch_size * 1e3 / row.ms_per_step:.1f}",
            f"{row.spread:.1%}",
            f"{row.floor_ms:.2f}",
            f"{row.ratio_to_floor:.2f}",
        )
    return table


def _profile_table(report: BenchReport) -> Table | None:
    if report.profile is None:
        return None
    table = _table("where a step spends its time", "operator", "ms", "share", "calls")
    for row in report.profile:
        table.add_row(
            row.kind, f"{row.ms_per_step:.3f}", f"{row.share:.1%}", f"{row.calls_per_step:g}"
        )
    return table
