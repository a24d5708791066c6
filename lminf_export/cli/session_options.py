"""Options of every command that loads a bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from lminf_export.cli.common import handle_errors
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
trust_code_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code of the model's repository, as the export did. Off by default.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of one operator."
)


def session_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --provider, --threads, --kernels, and trust in a plan."""
    return provider_option(threads_option(kernels_option(trusted_first(function))))


def trust_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --trust-plan and --trust-hash; the function gets one argument, `trust_plan`."""

    @click.option(
        "--trust-plan",
        is_flag=True,
        help="Run the bundle's plan and the library it brings, which are code, though they were "
        "not built here. Remembered for this bundle.",
    )
    @click.option(
        "--trust-hash",
        metavar="SHA256",
        help="The same, if the bundle's manifest_sha256 is this one.",
    )
    @functools.wraps(function)
    def wrapped(*args: Any, trust_plan: bool, trust_hash: str | None, **kwargs: Any) -> Any:
        return function(*args, trust_plan=trust_hash or trust_plan, **kwargs)

    return wrapped


def load_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what `load` takes; the function gets it as one table, `loading`."""

    @provider_option
    @click.option(
        "--no-cuda-graphs",
        is_flag=True,
        help="On a GPU, enqueue every single token instead of playing one from a CUDA graph.",
    )
    @kernels_option
    @threads_option
    @click.option("--revision", metavar="REV", help="Branch, tag or commit of a bundle on the hub.")
    @trust_options
    @click.option("--verify", is_flag=True, help="Hash every file first, weights too.")
    @functools.wraps(function)
    def wrapped(*args: Any, no_cuda_graphs: bool, verify: bool, **kwargs: Any) -> Any:
        names = ("provider", "kernels", "threads", "revision", "trust_plan")
        loading = {name: kwargs.pop(name) for name in names}
        loading |= {"cuda_graphs": not no_cuda_graphs, "verify": "full" if verify else "fast"}
        return function(*args, loading=loading, **kwargs)

    return wrapped


def trusted_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the same options to a command with an argument `bundle`: it is trusted before it runs."""

    @trust_options
    @handle_errors
    @functools.wraps(function)
    def wrapped(*args: Any, trust_plan: bool | str, **kwargs: Any) -> Any:
        if trust_plan is not False:
            from lminf_export.bundle.folder import Bundle
            from lminf_export.bundle.trust import require_trust

            opened = Bundle.open(kwargs["bundle"])
            if opened.manifest.engine is not None:
                require_trust(opened, trust_plan)
        return function(*args, **kwargs)

    return wrapped
