"""`torch.ops.lminf.lambda_attention`: the operator as torch and torch.export see it.

Eager mode runs `reference.lambda_attention`; under fake tensors only shapes flow; under
`torch.onnx.export` a call becomes one node `lminf::LambdaAttention` (see `translation_table`).
`lambda_attention_int8_cache` is the same over rings of int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx.defs
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

from lminf_export.operator import contract, reference, reference_int8
from lminf_export.tensors.dtypes import ELEMENT_TYPES, MODEL_DTYPES

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
    return _shapes(dict(zip(contract.input_names(), tensors, strict=True)))


@lambda_attention_int8_cache.register_fake
def _(*tensors: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    names = contract.input_names(int8_cache=True)  # a bias of keys has no part in the shapes
    inputs = dict(zip(names, tensors, strict=False))
    scales = (_contiguous(inputs[operand.name]) for operand in contract.SCALE_INPUTS)
    return (*_shapes(inputs), *scales)


def _shapes(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return empty tensors of the shapes and types of `contract.OUTPUTS`."""
    batch = inputs["query"].shape[0]
    sinks = (inputs["past_sink_key"], inputs["past_sink_value"])
    return (
        *(_contiguous(inputs[name]) for name in ("query", "past_key", "past_value")),
        *(sink.new_empty((batch, *sink.shape[1:])) for sink in sinks),
    )


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def operator_schema(*, int8_cache: bool = False, key_bias: bool = False) -> OpSchema:
    """Return the ONNX schema of version 1 of the operator, or of it over a ring of int8.

    Args:
        int8_cache: rings hold int8.
        key_bias: their keys lie there without their bias; for an int8 cache only.
    """

    types = {
        "model": "T",
        "ring": "tensor(int8)" if int8_cache else "T",
        "int64": "tensor(int64)",
        "float32": "tensor(float)",
    }
    kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}

    def parameters(operands: Iterable[contract.Operand]) -> list[OpSchema.FormalParameter]:
        return [OpSchema.FormalParameter(x.name, types[x.element]) for x in operands]

    attributes = [OpSchema.Attribute(x.name, kinds[x.kind]) for x in contract.ATTRIBUTES]
    namespace = OpSchema.Attribute(contract.PLUGIN_NAMESPACE_ATTRIBUTE, OpSchema.AttrType.STRING)
    return OpSchema(
        contract.op_type(int8_cache=int8_cache, key_bias=key_bias),
        contract.DOMAIN,
        contract.VERSION,
        doc="Λ-shaped attention over a bounded cache; arXiv 2308.16137.",
        inputs=parameters(contract.inputs(int8_cache=int8_cache, key_bias=key_bias)),
        outputs=parameters(contract.outputs(int8_cache=int8_cache)),
        type_constraints=[
            ("T", [ELEMENT_TYPES[name].onnxruntime for name in MODEL_DTYPES], "model type")
        ],
        attributes=[*attributes, namespace],
    )


def register_schema() -> None:
    """Tell the onnx package about the operators, once; the exporter's recorder asks for them."""
    for int8_cache, key_bias in ((False, False), (True, False), (True, True)):
        name = contract.op_type(int8_cache=int8_cache, key_bias=key_bias)
        if not onnx.defs.has(name, contract.DOMAIN):
            onnx.defs.register_schema(operator_schema(int8_cache=int8_cache, key_bias=key_bias))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export(custom_translation_table=…)` needs for the operators."""
    register_schema()
    return {
        torch.ops.lminf.lambda_attention.default: _translation(contract.OP_TYPE),
        torch.ops.lminf.lambda_attention_int8_cache.default: _int8_translation,
    }


def _int8_translation(*tensors: Any, **settings: Any) -> Any:
    with_bias = len(tensors) > len(contract.inputs(int8_cache=True))
    name = contract.op_type(int8_cache=True, key_bias=with_bias)
    return _translation(name)(*tensors, **settings)


def _translation(op_type: str) -> Callable[..., Any]:
    node = getattr(Opset(contract.DOMAIN, contract.VERSION), op_type)

    def to_onnx(*tensors: Any, rotary_interleaved: bool, **numbers: Any) -> Any:
        return node(
            *tensors,
            **numbers,
            rotary_interleaved=int(rotary_interleaved),
            plugin_namespace=contract.DOMAIN,
        )

    return to_onnx
