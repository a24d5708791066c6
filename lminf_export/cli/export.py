"""`lminf-export`: a model of Hugging Face in, a bundle out."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lminf_export.cli.common import (
    handle_errors,
    one_adapter,
    quiet_transformers,
    run_command,
    verbosity_options,
)
from lminf_export.cli.engine_options import engine_options
from lminf_export.cli.option_fields import option_of
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.quantize_options import quantize_options
from lminf_export.engine.options import ELSEWHERE
from lminf_export.export.options import CHOICES, ExportOptions

if TYPE_CHECKING:
    from lminf_export.bundle.folder import Bundle
    from lminf_export.bundle.manifest import Manifest
    from lminf_export.bundle.records import EngineRecipe
    from lminf_export.export.job import ExportJob

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
@option("model", metavar="ID|DIR", help="Hub id, or folder of a model.")
@option(
    "out",
    metavar="OUT",
    help="DIR writes the bundle DIR; DIR/engine.plan or DIR/model.onnx the bundle DIR with "
    "that as its last product; a bare engine.plan the bundle ./engine.",
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
    help="Element type of weights and caches; bfloat16 is for engines and GPUs.  "
    "[default: float16 with an engine, else float32]",
)
@quantize_options
@option(
    "kv_cache_dtype",
    help="Element type of the caches of the window; auto: that of --dtype, int8: integers with a "
    "scale for each token and key/value head, about a quarter of float32's bytes. Not for engines.",
)
@option(
    "weights",
    help="Write the weights into the bundle, or put hard links to the model's own files there: "
    "no copy, but of the same element type and on the same disk.",
)
@option(
    "builder",
    help="Builder of the engine, needed only where both are installed; none writes the files and "
    "the command with which TensorRT builds it on another machine.",
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
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be written.")
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
def export_command(dry_run: bool, **options: Any) -> None:
    """Export a language model so that it decodes a stream without end.

    Writes a bundle: the model as ONNX with Λ-shaped attention over a bounded cache, its weights
    and tokenizer, an engine if OUT asks for one, and a manifest. Run it with `lminf generate`.
    """
    from lminf_export.export.run import prepare, run_job

    quiet_transformers()
    with progress_bar(quiet=dry_run) as progress:
        job = prepare(ExportOptions(**options), progress)
        bundle = None if dry_run else run_job(job, progress)
    if bundle is None:
        _print_plan(job)
    else:
        _print_result(bundle)


@handle_errors
def main() -> None:
    """Entry point of `lminf-export`."""
    run_command(export_command, "lminf-export")


def _print_plan(job: ExportJob) -> None:
    from lminf_export.bundle.files import human_bytes

    draft, settings = job.manifest(), job.settings
    cache = human_bytes(draft.cache_bytes_per_sequence)
    rows = [
        ("model", f"{draft.model_type} from {draft.source.name}, {len(draft.layers)} layers"),
        *([("adapter", draft.source.adapter)] if draft.source.adapter else []),
        ("bundle", str(job.target.directory)),
        ("graph", job.target.graph_name),
        ("engine", _engine_plan(job)),
        ("element type", draft.dtype),
        ("quantised", draft.quantization.description if draft.quantization else "no"),
        ("weights", ("about " if job.quantize else "") + human_bytes(job.weight_bytes)),
        ("window", f"{settings.window_size} tokens, chunks of {settings.chunk_size}"),
        ("sink tokens", f"{settings.num_sink_tokens}, at distance {settings.distance_limit}"),
        ("cache", f"{_kind_of_cache(draft)}{cache} per sequence, without end"),
    ]
    for name, value in rows:
        click.echo(f"{name:13} {value}")
    for notice in draft.notices:
        click.echo(f"{'note':13} {notice}")
    click.echo("dry run: nothing was written")


def _kind_of_cache(manifest: Manifest) -> str:
    return f"{manifest.kv_cache_dtype}, " if manifest.kv_cache_dtype else ""


def _engine_plan(job: ExportJob) -> str:
    if job.builder is None:
        return "none"
    if job.builder == ELSEWHERE:
        return f"{job.target.engine_name}, to be built elsewhere"
    return f"{job.target.engine_name} by {job.builder}" + (" with its plugin" if job.plugin else "")


def _print_result(bundle: Bundle) -> None:
    from lminf_export.bundle.files import human_bytes

    manifest = bundle.manifest
    settings = manifest.settings
    quantized = f" and {manifest.quantization.weights}" if manifest.quantization else ""
    click.echo(
        f"{_shown(bundle.path)}: {manifest.model_type}, {manifest.dtype}{quantized}, window "
        f"{settings.window_size} + {settings.num_sink_tokens} sink tokens, cache "
        f"{_kind_of_cache(manifest)}{human_bytes(manifest.cache_bytes_per_sequence)} per sequence, "
        "without end"
    )
    for name, entry in manifest.files.items():
        if entry.role in ("graph", "weights", "plan", "plugin", "engine_graph"):
            click.echo(f"  {name:20} {human_bytes(entry.bytes):>10}")
    if manifest.engine is not None:
        engine = manifest.engine
        click.echo(f"engine: {engine.builder} {engine.version} for {engine.target}, {engine.note}")
    if manifest.engine_recipe is not None:
        _print_recipe(bundle, manifest.engine_recipe)


def _print_recipe(bundle: Bundle, recipe: EngineRecipe) -> None:
    """Say which script builds the plan with TensorRT's own command, and what to do with it then."""
    from lminf_export.bundle.records import BUILD_SCRIPT_NAME
    from lminf_export.engine.plugin import PLUGIN_FILE

    built = bundle.manifest.engine is not None
    folder = _shown(bundle.path)
    if BUILD_SCRIPT_NAME not in bundle.manifest.files:
        return  # a notice says why trtexec cannot build it
    script = shlex.join(["sh", str(folder / BUILD_SCRIPT_NAME)])
    click.echo(f"{'the same engine, built by hand' if built else 'build the engine'}: {script}")
    if built:
        return
    if recipe.needs_plugin and not bundle.manifest.files_of("plugin"):
        click.echo(f"with {PLUGIN_FILE} in that folder (docs/engines.md says how to build it)")
    words = ["lminf", "add-plan", str(folder), str(folder / recipe.file), "--target", "sm_XX"]
    click.echo(f"then register it there: {shlex.join(words)}")


def _shown(path: Path) -> Path:
    """Return a path relative to where the user is, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
