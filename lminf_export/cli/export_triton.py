"""`lminf export-triton`: a model repository for Triton."""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.errors import DependencyError, InputError, shown
from lminf_export.triton.interface import BACKENDS

_SLOTS = 8
# Parameters that are options of their own.
_OPTIONS = ("slots", "session_folder", "session_store", "session_secret_file")


def _once(_: click.Context, option: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Return the only value of an option; None for none."""
    if len(values) > 1:
        raise click.BadParameter("is given more than once", param=option)
    return values[0] if values else None


def _table(texts: tuple[str, ...]) -> dict[str, str]:
    """Return the parameters NAME=VALUE, each once and none that has an option.

    Raises:
        InputError: naming the text.
    """
    given: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InputError(f"--parameter {shown(text)}: expected NAME=VALUE")
        if key in _OPTIONS:
            raise InputError(f"--parameter {key}: give it by --{key.replace('_', '-')}")
        if key in given:
            raise InputError(f"--parameter {key} is given more than once")
        given[key] = value
    return given


@click.command("export-triton")
@click.argument("bundle", type=click.Path())
@click.option(
    "--out",
    required=True,
    multiple=True,
    callback=_once,
    type=click.Path(),
    help="The repository: a folder that is empty, new, or has other models.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    default=BACKENDS[:1],
    show_default=True,
    help="python: our runtime, with streams, batching and sessions; onnxruntime: the bare graph "
    "with implicit state; tensorrt: the bundle's plan, by our runtime where Triton's own backend "
    "cannot run it. Several make several models.",
)
@click.option(
    "--name",
    multiple=True,
    callback=_once,
    help="Name of the model.  [default: the bundle's folder]",
)
@click.option(
    "--slots",
    multiple=True,
    callback=_once,
    type=click.IntRange(min=1),
    help=f"Sequences that are written side by side.  [default: {_SLOTS}]",
)
@click.option(
    "--session-folder",
    multiple=True,
    callback=_once,
    type=click.Path(),
    help="Where the server keeps sessions over restarts; in the version's folder of the "
    "repository, if the path is not absolute.",
)
@click.option(
    "--session-store",
    multiple=True,
    callback=_once,
    metavar="URL",
    help="Keep sessions where other servers find them.",
)
@click.option(
    "--session-secret-file",
    multiple=True,
    callback=_once,
    type=click.Path(),
    help="File of that store's secret, on the server.",
)
@click.option(
    "--link",
    is_flag=True,
    help="Weights are hard links: they take no second place on the disk, and who writes to one "
    "writes to both. onnx loads no weights that have several links.",
)
@click.option(
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other setting of lminf serve, or provider, kernels, threads, template, trust_hash.",
)
@verbosity_options
@handle_errors
def export_triton_command(
    bundle: str,
    out: str,
    backends: tuple[str, ...],
    name: str | None,
    slots: int | None,
    session_folder: str | None,
    session_store: str | None,
    session_secret_file: str | None,
    link: bool,
    parameters: tuple[str, ...],
) -> None:
    """Write a model repository of BUNDLE for NVIDIA's Triton Inference Server."""
    if not importlib.util.find_spec("fastapi"):
        raise DependencyError(
            "export-triton needs what the server needs: pip install lminf-export[serve]"
        )
    from lminf_export.triton.repository import write_models

    given = _table(parameters)
    options = {
        "session_folder": session_folder,
        "session_store": session_store,
        "session_secret_file": session_secret_file,
    }
    given |= {key: value for key, value in options.items() if value is not None}
    folders = write_models(
        bundle,
        out,
        backends=backends,  # type: ignore[arg-type]
        name=name,
        slots=_SLOTS if slots is None else slots,
        parameters=given,
        link=link,
    )
    for folder in sorted(folders):
        click.echo(f"{folder}")
