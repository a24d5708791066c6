"""Options of every command that loads a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lminf_export.runtime.kernels import AUTO, NONE
from lminf_export.runtime.options import PROVIDERS

provider_option = click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    default=PROVIDERS[0],
    show_default=True,
    help="onnxruntime's execution provider.",
)
kernels_option = click.option(
    "--kernels",
    default=AUTO,
    show_default=True,
    metavar=f"{AUTO}|{NONE}|PATH",
    help="Implementation of attention in onnxruntime: auto takes the kernels installed with this "
    "package, if any; none the graph's own function body; or the path of a library.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of one operator."
)


def session_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --provider, --threads and --kernels."""
    return provider_option(threads_option(kernels_option(function)))
