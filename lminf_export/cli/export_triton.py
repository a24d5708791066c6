"""`lminf export-triton`: a model repository for Triton."""

from __future__ import annotations

import importlib.util

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.errors import DependencyError, InputError

BACKENDS = ("python", "onnxruntime", "tensorrt")


@click.command("export-triton")
@click.argument("bundle", type=click.Path())
@click.option(
    "--out", required=True, type=click.Path(), help="The repository: a folder that is empty or new."
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    default=BACKENDS[:1],
    show_default=True,
    help="python: our runtime, with streams, batching and sessions; onnxruntime: the bare graph "
    "with implicit state; tensorrt: the bundle's plan. Several make several models.",
)
@click.option("--name", help="Name of the model.  [default: the bundle's folder]")
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Sequences that are written side by side.",
)
@click.option(
    "--session-folder", type=click.Path(), help="Where the server keeps sessions over restarts."
)
@click.option("--session-store", metavar="URL", help="Keep sessions where other servers find them.")
@click.option(
    "--session-secret-file", type=click.Path(), help="File of that store's secret, on the server."
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
    slots: int,
    session_folder: str | None,
    session_store: str | None,
    session_secret_file: str | None,
    parameters: tuple[str, ...],
) -> None:
    """Write a model repository of BUNDLE for NVIDIA's Triton Inference Server."""
    if not importlib.util.find_spec("fastapi"):
        raise DependencyError(
            "export-triton needs what the server needs: pip install lminf-export[serve]"
        )
    from lminf_export.triton.repository import export_triton

    given = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not key or not equals:
            raise InputError(f"--parameter {parameter!r}: expected NAME=VALUE")
        given[key] = value
    options = {
        "session_folder": session_folder,
        "session_store": session_store,
        "session_secret_file": session_secret_file,
    }
    given |= {key: value for key, value in options.items() if value is not None}
    repository = export_triton(
        bundle,
        out,
        backends=backends,  # type: ignore[arg-type]
        name=name,
        slots=slots,
        parameters=given,
    )
    for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
        click.echo(f"{folder}")
