"""The options of quantisation, shared by commands that write bundles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lminf_export.cli.common import handle_errors
from lminf_export.cli.option_fields import option_of
from lminf_export.errors import ConfigError
from lminf_export.quantize.config import CHOICES, QuantizeConfig
from lminf_export.rewriting.detecting import find_onnx_model
from lminf_export.rewriting.options import for_checkpoints_only

R = TypeVar("R")

option = functools.partial(option_of, QuantizeConfig, CHOICES)

_DETAILS = (
    "block_size",
    "symmetric",
    "accuracy_level",
    "lm_head",
    "embeddings",
    "form",
    "scales",
    "source_blocks",
    "mixed",
)


def quantize_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add --quantize and what refines it; the command gets them as one `quantize`."""

    @option(
        "weights",
        "--quantize",
        "quantize",
        required=False,
        help="Quantise the weights of projections.  [default: not quantised]",
    )
    @option(
        "block_size",
        help="Input features of a quantised weight that share a scale.  [default: 32; 16 for int4 "
        "of models narrower than 2,048]",
    )
    @option(
        "symmetric",
        "--symmetric/--asymmetric",
        default=None,
        help="Whether quantised blocks are centred on zero.  [default: asymmetric for int4, but "
        "not in the Q/DQ form]",
    )
    @option(
        "accuracy_level",
        help="4: onnxruntime rounds activations to int8 before quantised products, which is "
        "fast; 1: it does not.",
    )
    @option(
        "lm_head",
        help="Type of the quantised last projection; auto: int8 for int4, else the same; full: it "
        "is not quantised.",
    )
    @option(
        "embeddings",
        help="Whether the embedding table is quantised; auto: if it is also the last projection's, "
        "and to 8 bits beside int4.",
    )
    @option(
        "form",
        "--quantize-form",
        help="onnxruntime's own product, or DequantizeLinear, which TensorRT takes.  "
        "[default: qdq with an engine]",
    )
    @option(
        "scales",
        help="Scales of 4-bit blocks: searched for the least squared error, or from the range.",
    )
    @option(
        "source_blocks",
        help="Whether quantised blocks of a GGUF file keep their own values where that can be.",
    )
    @option(
        "mixed",
        help="Store as int8, beside int4, the few projections whose errors cost most.",
    )
    @click.pass_context
    @handle_errors
    @functools.wraps(function)
    def wrapped(context: click.Context, *args: Any, **options: Any) -> R:
        details = {name: options.pop(name) for name in _DETAILS}
        kind = options.pop("quantize")
        if kind is None:
            _refuse_details(context, options.get("model"))
        else:
            if details["block_size"] is not None:
                details["block_size"] = int(details["block_size"])
            details["accuracy_level"] = int(details["accuracy_level"])
            options["quantize"] = QuantizeConfig(kind, **details)
        return function(*args, **options)

    return wrapped


def _refuse_details(context: click.Context, model: str | None) -> None:
    for name in _DETAILS:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = "--quantize-form" if name == "form" else f"--{name.replace('_', '-')}"
            if model is not None and find_onnx_model(model) is not None:
                raise for_checkpoints_only(option.removeprefix("--"), "quantize")
            raise ConfigError(f"{option} is about quantised weights; say --quantize int4 or int8")
