"""Options of commands that build an engine, folded into one `EngineOptions`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = ("plugin", "embed_plugin", "timing_cache", "workspace", "builder_optimization_level")


def engine_options(function: Callable[P, R]) -> Callable[..., R]:
    """Add the settings of TensorRT's builder; the command gets them as `engine_options`."""

    @click.option(
        "--plugin",
        metavar="PATH|none",
        help="Library of the TensorRT plugin; none builds from standard operators instead.  "
        "[default: the one built or installed with this package]",
    )
    @click.option(
        "--embed-plugin", is_flag=True, help="Put the plugin into the plan, not beside it."
    )
    @click.option(
        "--timing-cache",
        type=click.Path(),
        metavar="FILE",
        help="Keep what TensorRT has timed, for faster builds of the same model.",
    )
    @click.option(
        "--workspace",
        metavar="SIZE",
        help="GPU memory one layer may use while it works, such as 512M or 2G.  "
        "[default: TensorRT's own]",
    )
    @click.option(
        "--builder-optimization-level",
        type=int,
        metavar="0…5",
        help="How long TensorRT looks for a fast engine.  [default: TensorRT's own]",
    )
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        from lminf_export.engine.options import EngineOptions

        chosen: dict[str, Any] = {name: kwargs.pop(name) for name in _NAMES}
        kwargs["engine_options"] = EngineOptions(**chosen)
        return function(*args, **kwargs)

    return wrapped
