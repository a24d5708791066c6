"""Options of commands that build an engine, folded into one `EngineOptions`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

import click

from lminf_export.cli.option_fields import option_of
from lminf_export.engine.options import CHOICES, EngineOptions

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = tuple(field.name for field in fields(EngineOptions))


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
    @option_of(
        EngineOptions,
        CHOICES,
        "cache_aliasing",
        help="How TensorRT learns that the plugin updates caches in place: the plugin declares it, "
        "or past and present are bound to one address without a word.",
    )
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen: dict[str, Any] = {name: kwargs.pop(name) for name in _NAMES}
        kwargs["engine_options"] = EngineOptions(**chosen)
        return function(*args, **kwargs)

    return wrapped
