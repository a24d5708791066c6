"""The operator's border, written once: names, order, element types, shapes and attributes.

Everything that meets a node reads it here, or from what is generated from it: the torch operator
and its ONNX schema, the function body, the engine builder, and through
`plugins/operator/contract.h` the onnxruntime operator, the TensorRT plugin and the kernels.
Imports neither torch nor onnx.

Letters: B batch, H query heads, G key/value heads, S new tokens, C ring slots, N sink slots (at
least one; with num_sink_tokens = 0 a constant, of one row whatever the batch), D head dimension,
R rotated dimensions, T the rows of the tables in `rope`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DOMAIN = "lminf"
VERSION = 1
OP_TYPE = "LambdaAttention"
# The same over rings of int8, under a name of its own: a kernel or plugin that knows one of them
# need not know the other.
INT8_CACHE_OP_TYPE = "LambdaAttentionInt8Cache"
# The same again, where keys lie in the ring without the bias that their projection adds.
KEY_BIAS_OP_TYPE = "LambdaAttentionInt8CacheKeyBias"
# NVIDIA's parser looks a node up among the plugins of the namespace in this attribute.
PLUGIN_NAMESPACE_ATTRIBUTE = "plugin_namespace"

# "model": the type of activations; "ring": the same, but int8 with an int8 cache.
Element = Literal["model", "ring", "int64", "float32"]


@dataclass(frozen=True)
class Operand:
    """One input or output of a node.

    Attributes:
        name: in the schema, the function body, messages and generated code.
        element: which element type it has.
        shape: letters of its dimensions, outermost first.
        meaning: one phrase for docs and generated comments.
    """

    name: str
    element: Element
    shape: tuple[str, ...]
    meaning: str

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Attribute:
    """One attribute of a node: its name, its type in ONNX, what it means."""

    name: str
    kind: Literal["int", "float"]
    meaning: str


_NEW_QUERY = ("B", "H", "S", "D")
_NEW_KEY = ("B", "G", "S", "D")
_RING = ("B", "G", "C", "D")
_SINKS = ("B", "G", "N", "D")
_SCALES = ("B", "G", "C", "1")
_ROWS = ("B", "S", "R/2")
_TABLE = ("T", "R/2")

INPUTS = (
    Operand("query", "model", _NEW_QUERY, "new tokens, not rotated, after any QK-norm"),
    Operand("key", "model", _NEW_KEY, "new tokens, not rotated, after any QK-norm"),
    Operand("value", "model", _NEW_KEY, "new tokens"),
    Operand("past_key", "ring", _RING, "rotated, position p in slot p mod C"),
    Operand("past_value", "ring", _RING, "position p in slot p mod C"),
    Operand("past_sink_key", "model", _SINKS, "not rotated, position p in slot p"),
    Operand("past_sink_value", "model", _SINKS, "position p in slot p"),
    Operand("past_length", "int64", ("B",), "tokens each row has seen, 0 … 2⁴⁰"),
    Operand("new_length", "int64", ("B",), "real tokens each row brings, 0 … S; padding behind"),
    Operand("query_position", "int64", ("B", "S"), "follows from past_length"),
    Operand("slot_position", "int64", ("B", "C"), "follows from the lengths; negative if empty"),
    Operand("cos", "float32", _ROWS, "rows of the new tokens' positions"),
    Operand("sin", "float32", _ROWS, "rows of the new tokens' positions"),
    Operand("limit_cos", "float32", ("R/2",), "the row of the distance limit"),
    Operand("limit_sin", "float32", ("R/2",), "the row of the distance limit"),
    Operand("alibi_slopes", "float32", ("H",), "zeros without ALiBi"),
    Operand("sink_logits", "float32", ("H",), "learned logits in the denominator; −∞ for none"),
)
OUTPUTS = (
    Operand("output", "model", _NEW_QUERY, "what the new tokens attend to"),
    Operand("present_key", "ring", _RING, "past_key with the new keys"),
    Operand("present_value", "ring", _RING, "past_value with the new values"),
    Operand("present_sink_key", "model", _SINKS, "past_sink_key with new starting tokens"),
    Operand("present_sink_value", "model", _SINKS, "past_sink_value with new starting tokens"),
)
# What an int8 cache adds, behind the others.
SCALE_INPUTS = (
    Operand("past_key_scale", "float32", _SCALES, "of past_key, one for each token and head"),
    Operand("past_value_scale", "float32", _SCALES, "of past_value, one for each token and head"),
)
SCALE_OUTPUTS = (
    Operand("present_key_scale", "float32", _SCALES, "past_key_scale with the new scales"),
    Operand("present_value_scale", "float32", _SCALES, "past_value_scale with the new scales"),
)
# What it has behind those where keys lie in the ring without their bias.
KEY_BIAS_INPUTS = (
    Operand("key_bias", "model", ("G", "D"), "part of every key, kept out of the ring"),
    Operand("cos_table", "float32", _TABLE, "rows of the digits of any position"),
    Operand("sin_table", "float32", _TABLE, "rows of the digits of any position"),
)
# Integers first: the order in which the function body declares them.
ATTRIBUTES = (
    Attribute("num_sink_tokens", "int", "N ≥ 0, starting tokens that stay visible"),
    Attribute("window_size", "int", "W ≥ 1, keys a query sees, its own included"),
    Attribute("distance_limit", "int", "L ≥ W, distance of an evicted starting token"),
    Attribute("rotary_dim", "int", "R, even, at most D; 0 for no rotation"),
    Attribute("rotary_interleaved", "int", "1 pairs dimensions 2i and 2i + 1, 0 i and i + R/2"),
    Attribute("scale", "float", "factor of every logit"),
    Attribute("softcap", "float", "c replaces a logit x by c·tanh(x / c); 0 for none"),
)


def op_type(*, int8_cache: bool, key_bias: bool = False) -> str:
    """Return the operator's name; key_bias is for an int8 cache only."""
    if key_bias:
        return KEY_BIAS_OP_TYPE
    return INT8_CACHE_OP_TYPE if int8_cache else OP_TYPE


def inputs(*, int8_cache: bool = False, key_bias: bool = False) -> tuple[Operand, ...]:
    """Return a node's inputs, in order."""
    if key_bias:
        return (*INPUTS, *SCALE_INPUTS, *KEY_BIAS_INPUTS)
    return (*INPUTS, *SCALE_INPUTS) if int8_cache else INPUTS


def outputs(*, int8_cache: bool = False) -> tuple[Operand, ...]:
    """Return a node's outputs, in order."""
    return (*OUTPUTS, *SCALE_OUTPUTS) if int8_cache else OUTPUTS


def input_names(*, int8_cache: bool = False, key_bias: bool = False) -> tuple[str, ...]:
    """Return the names of a node's inputs, in order."""
    return tuple(operand.name for operand in inputs(int8_cache=int8_cache, key_bias=key_bias))


def output_names(*, int8_cache: bool = False) -> tuple[str, ...]:
    """Return the names of a node's outputs, in order."""
    return tuple(operand.name for operand in outputs(int8_cache=int8_cache))


def attribute_names() -> tuple[str, ...]:
    """Return the names of a node's attributes, in order, without the plugin's namespace."""
    return tuple(attribute.name for attribute in ATTRIBUTES)
