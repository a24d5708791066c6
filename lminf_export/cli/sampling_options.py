"""Options of every command that lets a model write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from lminf_export.cli.common import require_unicode
from lminf_export.errors import InputError

_OPTIONS = (
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="Divides the logits; 0 takes the likeliest token.",
    ),
    click.option(
        "--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest; 0: all."
    ),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        help="Keep the likeliest tokens that together reach this probability.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        help="Drop tokens less likely than this share of the likeliest.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Above 1: make tokens seen within the window less likely.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken from the logit of every token that the answer has, -2 to 2.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken from a logit as often as the answer has the token, -2 to 2.",
    ),
    click.option("--seed", type=int, help="Draw the same text again."),
)


def _stops(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(require_unicode("--stop", text) for text in given)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


stop_option = click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    callback=_stops,
    help="End before this text; repeatable.",
)
_NAMES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --temperature and the others; the function gets one table, `sampling`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sampling = {name: kwargs.pop(name) for name in _NAMES}
        return function(*args, sampling=sampling, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
