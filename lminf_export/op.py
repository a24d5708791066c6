"""`torch.ops.lminf.lambda_attention`: the operator as torch and torch.export see it.

Eager mode runs `reference.lambda_attention`; under fake tensors only shapes flow; under
`torch.onnx.export` a call becomes one node `lminf::LambdaAttention` (see `translation_table`).
`lambda_attention_int8_cache` is the same over rings of int8, a node of a name of its own: a kernel
or plugin that knows one of them need not know the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx.defs
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

from lminf_export import reference, reference_int8

DOMAIN = "lminf"
OP_TYPE = "LambdaAttention"
INT8_CACHE_OP_TYPE = "LambdaAttentionInt8Cache"
OP_VERSION = 1

INPUT_NAMES = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "past_sink_key",
    "past_sink_value",
    "past_length",
    "new_length",
    "query_position",
    "slot_position",
    "cos",
    "sin",
    "limit_cos",
    "limit_sin",
    "alibi_slopes",
    "sink_logits",
)
OUTPUT_NAMES = ("output", "present_key", "present_value", "present_sink_key", "present_sink_value")
# What a ring of int8 adds, behind the others.
SCALE_INPUT_NAMES = ("past_key_scale", "past_value_scale")
SCALE_OUTPUT_NAMES = ("present_key_scale", "present_value_scale")
RING_NAMES = ("past_key", "past_value", "present_key", "present_value")
INTEGER_INPUTS = ("past_length", "new_length", "query_position", "slot_position")
FLOAT32_INPUTS = ("cos", "sin", "limit_cos", "limit_sin", "alibi_slopes", "sink_logits")
# NVIDIA's parser looks a node up among the plugins of this namespace.
PLUGIN_NAMESPACE_ATTRIBUTE = "plugin_namespace"
INTEGER_ATTRIBUTES = (
    "num_sink_tokens",
    "window_size",
    "distance_limit",
    "rotary_dim",
    "rotary_interleaved",
)
FLOAT_ATTRIBUTES = ("scale", "softcap")


lambda_attention = torch.library.custom_op(
    "lminf::lambda_attention", reference.lambda_attention, mutates_args=()
)
lambda_attention_int8_cache = torch.library.custom_op(
    "lminf::lambda_attention_int8_cache",
    reference_int8.lambda_attention_int8_cache,
    mutates_args=(),
)


@lambda_attention.register_fake
def _(*tensors: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    return _shapes(dict(zip(INPUT_NAMES, tensors, strict=True)))


@lambda_attention_int8_cache.register_fake
def _(*tensors: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    inputs = dict(zip(input_names(int8_cache=True), tensors, strict=True))
    return (*_shapes(inputs), *(_contiguous(inputs[name]) for name in SCALE_INPUT_NAMES))


def _shapes(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return empty tensors of the shapes and types of `OUTPUT_NAMES`."""
    batch = inputs["query"].shape[0]
    sinks = (inputs["past_sink_key"], inputs["past_sink_value"])
    return (
        *(_contiguous(inputs[name]) for name in ("query", "past_key", "past_value")),
        *(sink.new_empty((batch, *sink.shape[1:])) for sink in sinks),
    )


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def input_names(*, int8_cache: bool) -> tuple[str, ...]:
    """Return the names of a node's inputs, in order."""
    return (*INPUT_NAMES, *SCALE_INPUT_NAMES) if int8_cache else INPUT_NAMES


def output_names(*, int8_cache: bool) -> tuple[str, ...]:
    """Return the names of a node's outputs, in order."""
    return (*OUTPUT_NAMES, *SCALE_OUTPUT_NAMES) if int8_cache else OUTPUT_NAMES


def operator_schema(*, int8_cache: bool = False) -> OpSchema:
    """Return the ONNX schema of version 1 of the operator, or of it over a ring of int8."""

    def parameter(name: str) -> OpSchema.FormalParameter:
        if name in INTEGER_INPUTS:
            return OpSchema.FormalParameter(name, "tensor(int64)")
        if name in (*FLOAT32_INPUTS, *SCALE_INPUT_NAMES, *SCALE_OUTPUT_NAMES):
            return OpSchema.FormalParameter(name, "tensor(float)")
        if int8_cache and name in RING_NAMES:
            return OpSchema.FormalParameter(name, "tensor(int8)")
        return OpSchema.FormalParameter(name, "T")

    attributes = [
        *(OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in INTEGER_ATTRIBUTES),
        *(OpSchema.Attribute(name, OpSchema.AttrType.FLOAT) for name in FLOAT_ATTRIBUTES),
        OpSchema.Attribute(PLUGIN_NAMESPACE_ATTRIBUTE, OpSchema.AttrType.STRING),
    ]
    return OpSchema(
        INT8_CACHE_OP_TYPE if int8_cache else OP_TYPE,
        DOMAIN,
        OP_VERSION,
        doc="Λ-shaped attention over a bounded cache; arXiv 2308.16137.",
        inputs=[parameter(name) for name in input_names(int8_cache=int8_cache)],
        outputs=[parameter(name) for name in output_names(int8_cache=int8_cache)],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "model type")
        ],
        attributes=attributes,
    )


def register_schema() -> None:
    """Tell the onnx package about the operators, once; the exporter's recorder asks for them."""
    for name, int8_cache in ((OP_TYPE, False), (INT8_CACHE_OP_TYPE, True)):
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(operator_schema(int8_cache=int8_cache))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export(custom_translation_table=…)` needs for the operators."""
    register_schema()
    return {
        torch.ops.lminf.lambda_attention.default: _translation(OP_TYPE),
        torch.ops.lminf.lambda_attention_int8_cache.default: _translation(INT8_CACHE_OP_TYPE),
    }


def _translation(op_type: str) -> Callable[..., Any]:
    node = getattr(Opset(DOMAIN, OP_VERSION), op_type)

    def to_onnx(*tensors: Any, rotary_interleaved: bool, **numbers: Any) -> Any:
        return node(
            *tensors,
            **numbers,
            rotary_interleaved=int(rotary_interleaved),
            plugin_namespace=DOMAIN,
        )

    return to_onnx
