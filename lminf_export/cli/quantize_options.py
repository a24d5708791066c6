"""The options of quantisation, shared by commands that write bundles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lminf_export.cli.common import handle_errors
from lminf_export.errors import ConfigError
from lminf_export.quantize.config import (
    ACCURACY_LEVELS,
    BLOCK_SIZES,
    DEFAULT_BLOCK_SIZE,
    EMBEDDINGS,
    FORMS,
    LM_HEADS,
    WEIGHT_TYPES,
    QuantizeConfig,
)

R = TypeVar("R")

_DETAILS = ("block_size", "symmetric", "accuracy_level", "lm_head", "embeddings", "form")


def quantize_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add --quantize and what refines it; the command gets them as one `quantize`."""

    @click.option(
        "--quantize",
        type=click.Choice(WEIGHT_TYPES),
        help="Store the weights of projections in blocks of so many bits.  [default: not]",
    )
    @click.option(
        "--block-size",
        type=click.Choice([str(size) for size in BLOCK_SIZES]),
        default=str(DEFAULT_BLOCK_SIZE),
        show_default=True,
        help="Of a quantised weight: input features that share a scale.",
    )
    @click.option(
        "--symmetric/--asymmetric",
        default=True,
        help="Whether quantised blocks are centred on zero.  [default: symmetric]",
    )
    @click.option(
        "--accuracy-level",
        type=click.Choice([str(level) for level in ACCURACY_LEVELS]),
        default="4",
        show_default=True,
        help="4: onnxruntime rounds activations to int8 before quantised products, which is "
        "fast; 1: it does not.",
    )
    @click.option(
        "--lm-head",
        type=click.Choice(LM_HEADS),
        default="same",
        show_default=True,
        help="How the last projection is quantised; full: not.",
    )
    @click.option(
        "--embeddings",
        type=click.Choice(EMBEDDINGS),
        default="auto",
        show_default=True,
        help="auto: the table is quantised where it is the last projection's, too.",
    )
    @click.option(
        "--quantize-form",
        "form",
        type=click.Choice(FORMS),
        help="onnxruntime's own product, or DequantizeLinear, which TensorRT takes.  "
        "[default: qdq with an engine]",
    )
    @click.pass_context
    @handle_errors
    @functools.wraps(function)
    def wrapped(context: click.Context, *args: Any, **options: Any) -> R:
        details = {name: options.pop(name) for name in _DETAILS}
        kind = options.pop("quantize")
        if kind is None:
            _refuse_details(context)
        else:
            details["block_size"] = int(details["block_size"])
            details["accuracy_level"] = int(details["accuracy_level"])
            options["quantize"] = QuantizeConfig(kind, **details)
        return function(*args, **options)

    return wrapped


def _refuse_details(context: click.Context) -> None:
    for name in _DETAILS:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = "--quantize-form" if name == "form" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is about quantised weights; say --quantize int4 or int8")
