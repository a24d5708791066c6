"""`lminf-export`: a model of Hugging Face in, a bundle out."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from lminf_export.checkpoint.config_file import check_local_config
from lminf_export.cli.common import (
    handle_errors,
    one_adapter,
    quiet_transformers,
    read_text,
    run_command,
    verbosity_options,
)
from lminf_export.cli.engine_options import engine_options
from lminf_export.cli.option_fields import option_of
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.quantize_options import quantize_options
from lminf_export.cli.signals import when_interrupted
from lminf_export.cli.terminal import echo_json
from lminf_export.export.options import CHOICES, ExportOptions
from lminf_export.rewriting.detecting import find_onnx_model
from lminf_export.rewriting.options import for_checkpoints_only
from lminf_export.tensors.dtypes import DTYPE_ALIASES

if TYPE_CHECKING:
    from lminf_export.cli.export_report import ExportReport, PlanReport
    from lminf_export.export.job import ExportJob
    from lminf_export.progress import Progress
    from lminf_export.rewriting.job import RewriteJob

option = functools.partial(option_of, ExportOptions, CHOICES)


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        import lminf_export

        click.echo(f"lminf-export {lminf_export.__version__}")
        ctx.exit()


@click.command(
    "lminf-export",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@option(
    "model",
    metavar="ID|DIR|FILE",
    help="Hub id, folder of a model, GGUF file, or ONNX model that another tool exported (its "
    "folder or .onnx file), which is rewritten.",
)
@option(
    "out",
    metavar="OUT",
    help="DIR writes the bundle DIR; DIR/engine.plan or DIR/model.onnx the bundle DIR with "
    "that as its last product; a bare engine.plan the bundle ./engine.",
)
@option(
    "tokenizer",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder with the tokenizer and config.json of an ONNX model that has none beside it.",
)
@option(
    "num_sink_tokens",
    type=int,
    metavar="N",
    help="Starting tokens that stay visible without end.",
)
@option(
    "window_size",
    type=int,
    metavar="W",
    help="Keys a query sees, its own included.  [default: the original training length, "
    "at most 4096]",
)
@option(
    "distance_limit",
    type=int,
    metavar="L",
    help="Distance at which starting tokens appear once they have left the window.  "
    "[default: the window]",
)
@option("chunk_size", type=int, metavar="S", help="Largest number of new tokens in one step.")
@option(
    "lambda_layers",
    help="Layers that keep the starting tokens: those that see everything by training, or also "
    "those with a sliding window of their own.",
)
@option(
    "rope_regime",
    help="Regime in which a rotary scaling that depends on the length of the text (dynamic, "
    "longrope) is frozen.  [default: the one that fits the window]",
)
@option(
    "dtype",
    aliases=DTYPE_ALIASES,
    help="Element type of weights and caches, also fp32, fp16 and bf16; bfloat16 is for engines "
    "and GPUs.  "
    "[default: float16 with an engine, else float32]",
)
@quantize_options
@option(
    "calibrate",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Make up for the rounding to int4 on the inputs that this text gives the weights.",
)
@click.option(
    "--sample-text",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Measure what quantisation costs on the first tokens of this text.  [default: the text "
    "of --calibrate]",
)
@option(
    "kv_cache_dtype",
    help="Element type of the caches of the window; auto: that of --dtype, int8: integers with a "
    "scale for each token and key/value head, about a quarter of float32's bytes; an engine with "
    "it needs the plugin.",
)
@option(
    "weights",
    help="Write the weights into the bundle, or put hard links to the model's own files there: "
    "no copy, but of the same element type and on the same disk.",
)
@option(
    "builder",
    help="Builder of the engine, needed only where both are installed; none writes the files and "
    "the script with which TensorRT builds it on another machine.",
)
@option(
    "max_batch_size",
    type=int,
    metavar="B",
    help="Largest batch of the engine; the ONNX graph takes any.",
)
@option("revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@option("cache_dir", type=click.Path(file_okay=False), help="Folder in which hub files are kept.")
@option("trust_remote_code", help="Run Python code of the model repository. Off by default.")
@option(
    "allow_pickle",
    help="Read .bin weights where there are no safetensors; only tensors are unpickled. Off by "
    "default.",
)
@option(
    "lora",
    multiple=True,
    metavar="DIR",
    callback=one_adapter,
    help="Merge this PEFT LoRA adapter into the weights.",
)
@option("force", help="Replace an existing bundle.")
@option(
    "check",
    "--check/--no-check",
    help="Run the written graph on a few tokens and compare it with the unmodified model.  "
    "[default: check]",
)
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be written.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print what was written, or would be, as JSON."
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@verbosity_options
@handle_errors
@engine_options
def export_command(dry_run: bool, as_json: bool, sample_text: str | None, **options: Any) -> None:
    """Export a language model so that it decodes a stream without end.

    Writes a bundle: the model as ONNX with Λ-shaped attention over a bounded cache, its weights
    and tokenizer, an engine if OUT asks for one, and a manifest. Run it with `lminf generate`.
    """
    is_onnx = find_onnx_model(options["model"]) is not None
    if not is_onnx:
        check_local_config(options["model"])
    elif sample_text is not None:
        raise for_checkpoints_only("sample_text", "calibrate")
    from lminf_export.cli.export_report import PlanReport
    from lminf_export.export import run as exporting
    from lminf_export.rewriting import run as rewriting

    quiet_transformers()
    asked = ExportOptions(**options)
    sample = sample_text or asked.calibrate
    text = None if sample is None else read_text(str(sample))
    report: ExportReport | PlanReport
    with when_interrupted(lambda: "nothing was written"), progress_bar(quiet=dry_run) as progress:
        # A dry run replaces nothing, so it needs no leave to.
        checked = replace(asked, force=asked.force or dry_run)
        job: ExportJob | RewriteJob
        if is_onnx:
            job = rewriting.prepare(checked, progress)
        else:
            job = exporting.prepare(checked, progress)
        report = PlanReport(job) if dry_run else _written(job, text, progress)
    if as_json:
        echo_json(report.to_dict())
    else:
        report.print()


def _written(job: ExportJob | RewriteJob, text: str | None, progress: Progress) -> ExportReport:
    """Export or rewrite; measure what quantisation costs on a text where there is one."""
    from lminf_export.cli.export_report import ExportReport
    from lminf_export.export.run import run_job
    from lminf_export.rewriting.job import RewriteJob
    from lminf_export.rewriting.run import run_job as run_rewrite
    from lminf_export.verify.sample_cost import sample_cost

    if isinstance(job, RewriteJob):
        return ExportReport(run_rewrite(job, progress))
    bundle = run_job(job, progress)
    if text is None or job.quantize is None:
        return ExportReport(bundle)
    return ExportReport(bundle, sample_cost(bundle, job.checkpoint, job.family, text, progress))


@handle_errors
def main() -> None:
    """Entry point of `lminf-export`."""
    run_command(export_command, "lminf-export")


if __name__ == "__main__":
    main()
