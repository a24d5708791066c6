"""`lminf::LambdaAttention` written in standard ONNX operators (opset 24).

The model carries this function, so an onnxruntime that has never heard of Λ-attention runs
it. A kernel registered under the same name takes the node instead.

What is the same for every layer (masks, slots, gathered rotation rows) hangs only on inputs
that all layers share; after inlining, common-subexpression elimination leaves one copy of it.

The old cache is read by nothing but the write. With past and present bound to one buffer the
write happens in place, and a later reader of the past would see new data.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx.parser

from lminf_export.operator import contract, key_bias_body, reference_int8

OPSET = 24
# Finite, so that a padded row that sees no key stays finite: exp(this − any logit) is 0.
MASKED = -1e30


@dataclass(frozen=True)
class BodyFeatures:
    """Features that the attention of a model uses; the rest is left out of the body.

    Attributes:
        rotary: some layer rotates queries and keys.
        alibi: a distance bias per head is added.
        softcap: logits are soft-capped.
        sink_logits: learned logits join the denominator.
        int8_cache: rings hold int8 with a scale for each token and key/value head.
        key_bias: their keys lie there without their bias; for an int8 cache only.
    """

    rotary: bool = True
    alibi: bool = False
    softcap: bool = False
    sink_logits: bool = False
    int8_cache: bool = False
    key_bias: bool = False


def function_body(features: BodyFeatures) -> onnx.FunctionProto:
    """Return the operator as a model-local function.

    Inputs, outputs and attributes are those of `reference.lambda_attention`, with an int8 cache
    those of `reference_int8.lambda_attention_int8_cache`, its bias of keys where there is one.
    """
    int8_cache, key_bias = features.int8_cache, features.key_bias
    rotation, new_key = _ROTATION[features.rotary], _NEW_KEY[int8_cache][features.rotary]
    products = _PRODUCTS[int8_cache]
    lines = [
        *_CONSTANTS,
        *(key_bias_body.new_key(rotation, new_key) if key_bias else (*rotation, *new_key)),
        *_WRITE[int8_cache],
        *_SINKS,
        *_MASK,
        *(key_bias_body.products(products, rotary=features.rotary) if key_bias else products),
        *_LOGITS,
        *_SOFTCAP[features.softcap],
        *_BIAS[features.alibi],
        *_SOFTMAX[features.sink_logits],
        *_VALUES[int8_cache],
        "output = Reshape (grouped_output, query_shape)",
    ]
    name = contract.op_type(int8_cache=int8_cache, key_bias=key_bias)
    inputs = contract.input_names(int8_cache=int8_cache, key_bias=key_bias)
    outputs = contract.output_names(int8_cache=int8_cache)
    attributes = ", ".join(contract.attribute_names())
    text = (
        f'<opset_import: ["" : {OPSET}], domain: "{contract.DOMAIN}">\n'
        f"{name} <{attributes}> ({', '.join(inputs)})"
        f" => ({', '.join(outputs)})\n{{\n" + "\n".join(lines) + "\n}"
    )
    function = onnx.parser.parse_function(text)
    function.doc_string = "Λ-shaped attention over a bounded cache; arXiv 2308.16137."
    # A node may name its plugin's namespace; the body has no use for it.
    function.attribute_proto.append(
        onnx.helper.make_attribute(contract.PLUGIN_NAMESPACE_ATTRIBUTE, contract.DOMAIN)
    )
    return function


_CONSTANTS = (
    "zero = Constant <value_int: int = 0> ()",
    "one = Constant <value_int: int = 1> ()",
    "axis_1 = Constant <value_ints: ints = [1]> ()",
    "axis_2 = Constant <value_ints: ints = [2]> ()",
    "axis_3 = Constant <value_ints: ints = [3]> ()",
    "axis_1_2 = Constant <value_ints: ints = [1, 2]> ()",
    "axis_0_2_3 = Constant <value_ints: ints = [0, 2, 3]> ()",
    "axis_head_and_dim = Constant <value_ints: ints = [1, 3]> ()",
    "num_sinks = Constant <value_int: int = @num_sink_tokens> ()",
    "window = Constant <value_int: int = @window_size> ()",
    "scale_value = Constant <value_float: float = @scale> ()",
    f"masked = Constant <value_float: float = {MASKED}> ()",
    "unmasked = Constant <value_float: float = 0.0> ()",
    "kv_heads = Shape <start: int = 1, end: int = 2> (key)",
    "head_dim = Shape <start: int = 3, end: int = 4> (key)",
    "query_shape = Shape (query)",
    "rest = Constant <value_ints: ints = [-1]> ()",
    "keep = Constant <value_ints: ints = [0]> ()",
    # (B, H, S, D) seen as (B, G, H/G·S, D): the query heads of a group share its keys.
    "grouped_shape = Concat <axis: int = 0> (keep, kv_heads, rest, head_dim)",
    "query_32 = Cast <to: int = 1> (query)",
)

_ROTATION = {
    True: (
        "key_32 = Cast <to: int = 1> (key)",
        "rows_shape = Shape (cos)",
        "limit_cos_rows = Expand (limit_cos, rows_shape)",
        "limit_sin_rows = Expand (limit_sin, rows_shape)",
        *(
            f"{result} = RotaryEmbedding <interleaved: int = @rotary_interleaved,"
            f" rotary_embedding_dim: int = @rotary_dim> ({source}, {rows})"
            for result, source, rows in (
                ("local_query_32", "query_32", "cos, sin"),
                ("local_key_32", "key_32", "cos, sin"),
                ("sink_query_32", "query_32", "limit_cos_rows, limit_sin_rows"),
            )
        ),
    ),
    False: (
        "local_query_32 = Identity (query_32)",
        "sink_query_32 = Identity (query_32)",
    ),
}

# Without and with an int8 cache, which rounds the key as it is in float32; then by rotation.
_NEW_KEY: dict[bool, dict[bool, tuple[str, ...]]] = {
    False: {
        True: ("local_key = CastLike (local_key_32, key)",),
        False: ("local_key = Identity (key)",),
    },
    True: {True: (), False: ("local_key_32 = Cast <to: int = 1> (key)",)},
}


def _scatter(past: str, new: str) -> str:
    present = past.replace("past", "present")
    return (
        f'{present} = TensorScatter <axis: int = 2, mode: string = "circular">'
        f" ({past}, {new}, write_index)"
    )


def _on_device(size: str, scalar: str) -> tuple[str, ...]:
    """Return lines for a size that Shape yielded, as (1,) int64 where lengths lie.

    Shape's results lie in main memory; computed with lengths they would be copied to the GPU in
    every step, and no CUDA graph could be captured. Range writes to the GPU.
    """
    return (
        f"{scalar}_counted = Range (zero, {scalar}, one)",
        f"{scalar}_last = Gather ({scalar}_counted, rest)",
        f"{size} = Add ({scalar}_last, one)",
    )


_SLOTS = (
    "capacity = Shape <start: int = 1, end: int = 2> (slot_position)",
    "num_slots = Squeeze (capacity)",
    *_on_device("capacity_1d", "num_slots"),
    "write_index = Mod (past_length, capacity_1d)",
)

_WRITE = {
    False: (*_SLOTS, _scatter("past_key", "local_key"), _scatter("past_value", "value")),
    # reference_int8.quantize: Round takes ties to even.
    True: (
        *_SLOTS,
        f"int8_limit = Constant <value_float: float = {reference_int8.INT8_LIMIT}.0> ()",
        f"int8_least = Constant <value_float: float = -{reference_int8.INT8_LIMIT}.0> ()",
        "one_32 = Constant <value_float: float = 1.0> ()",
        "value_32 = Cast <to: int = 1> (value)",
        *(
            line.format(x=x, source=source)
            for x, source in (("key", "local_key_32"), ("value", "value_32"))
            for line in (
                "{x}_sizes = Abs ({source})",
                "{x}_largest = ReduceMax <keepdims: int = 1> ({x}_sizes, axis_3)",
                "{x}_scale = Div ({x}_largest, int8_limit)",
                "{x}_is_zero = Equal ({x}_scale, unmasked)",
                "{x}_divisor = Where ({x}_is_zero, one_32, {x}_scale)",
                "{x}_steps = Div ({source}, {x}_divisor)",
                "{x}_rounded = Round ({x}_steps)",
                "{x}_clipped = Clip ({x}_rounded, int8_least, int8_limit)",
                "{x}_int8 = Cast <to: int = 3> ({x}_clipped)",
            )
        ),
        *(
            _scatter(f"past_{x}{suffix}", f"{x}{new}")
            for x in ("key", "value")
            for suffix, new in (("", "_int8"), ("_scale", "_scale"))
        ),
    ),
}

_SINKS = (
    # Sink slot n takes the new token at position n, if this chunk brings it.
    "num_sink_slots = Max (num_sinks, one)",
    "sink_position = Range (zero, num_sink_slots, one)",
    "past_length_column = Unsqueeze (past_length, axis_1)",
    "new_length_column = Unsqueeze (new_length, axis_1)",
    "sink_step = Sub (sink_position, past_length_column)",
    "sink_begun = GreaterOrEqual (sink_step, zero)",
    "sink_within = Less (sink_step, new_length_column)",
    "sink_arrives = And (sink_begun, sink_within)",
    "sink_arrives_4d = Unsqueeze (sink_arrives, axis_head_and_dim)",
    "sequence = Shape <start: int = 1, end: int = 2> (query_position)",
    "sequence_scalar = Squeeze (sequence)",
    *_on_device("sequence_1d", "sequence_scalar"),
    "last_step_1d = Sub (sequence_1d, one)",
    "last_step = Squeeze (last_step_1d, keep)",
    "sink_source = Clip (sink_step, zero, last_step)",
    "sink_source_4d = Unsqueeze (sink_source, axis_head_and_dim)",
    "source_heads = Concat <axis: int = 0> (axis_1, kv_heads, axis_1, head_dim)",
    "sink_source_all = Expand (sink_source_4d, source_heads)",
    "new_sink_key = GatherElements <axis: int = 2> (key, sink_source_all)",
    "new_sink_value = GatherElements <axis: int = 2> (value, sink_source_all)",
    "present_sink_key = Where (sink_arrives_4d, new_sink_key, past_sink_key)",
    "present_sink_value = Where (sink_arrives_4d, new_sink_value, past_sink_value)",
)

_MASK = (
    "query_column = Unsqueeze (query_position, axis_2)",
    "slot_row = Unsqueeze (slot_position, axis_1)",
    "ring_distance = Sub (query_column, slot_row)",
    "ring_begun = GreaterOrEqual (ring_distance, zero)",
    "ring_near = Less (ring_distance, window)",
    "ring_filled = GreaterOrEqual (slot_row, zero)",
    "ring_in_window = And (ring_begun, ring_near)",
    "ring_seen = And (ring_in_window, ring_filled)",
    "sink_distance = Sub (query_column, sink_position)",
    "sink_far = GreaterOrEqual (sink_distance, window)",
    "sink_real = Less (sink_position, num_sinks)",
    "sink_seen = And (sink_far, sink_real)",
    "seen = Concat <axis: int = 2> (sink_seen, ring_seen)",
    "mask_3d = Where (seen, unmasked, masked)",
    "mask = Unsqueeze (mask_3d, axis_1)",
)

_PRODUCTS = {
    False: (
        "local_query_scaled = Mul (local_query_32, scale_value)",
        "sink_query_scaled = Mul (sink_query_32, scale_value)",
        "local_query_typed = CastLike (local_query_scaled, query)",
        "sink_query_typed = CastLike (sink_query_scaled, query)",
        "local_query = Reshape (local_query_typed, grouped_shape)",
        "sink_query = Reshape (sink_query_typed, grouped_shape)",
        "ring_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (present_key)",
        "sink_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (present_sink_key)",
        "ring_product = MatMul (local_query, ring_key_t)",
        "sink_product = MatMul (sink_query, sink_key_t)",
        "products = Concat <axis: int = 3> (sink_product, ring_product)",
    ),
    # In float32: products with integers up to 127 would leave float16's range. A key's scale
    # multiplies its logits, C numbers a query and not C · D.
    True: (
        "local_query_scaled = Mul (local_query_32, scale_value)",
        "sink_query_scaled = Mul (sink_query_32, scale_value)",
        "sink_query_typed = CastLike (sink_query_scaled, query)",
        "local_query = Reshape (local_query_scaled, grouped_shape)",
        "sink_query = Reshape (sink_query_typed, grouped_shape)",
        "ring_key_t_int8 = Transpose <perm: ints = [0, 1, 3, 2]> (present_key)",
        "ring_key_t = Cast <to: int = 1> (ring_key_t_int8)",
        "ring_key_scale = Transpose <perm: ints = [0, 1, 3, 2]> (present_key_scale)",
        "sink_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (present_sink_key)",
        "ring_steps = MatMul (local_query, ring_key_t)",
        "ring_product = Mul (ring_steps, ring_key_scale)",
        "sink_product_typed = MatMul (sink_query, sink_key_t)",
        "sink_product = Cast <to: int = 1> (sink_product_typed)",
        "products = Concat <axis: int = 3> (sink_product, ring_product)",
    ),
}

_LOGITS = (
    "heads_and_steps = Shape <start: int = 0, end: int = 3> (query)",
    "logits_shape = Concat <axis: int = 0> (heads_and_steps, rest)",
    "products_by_head = Reshape (products, logits_shape)",
    "logits = Cast <to: int = 1> (products_by_head)",
)

_SOFTCAP = {
    True: (
        "cap = Constant <value_float: float = @softcap> ()",
        "logits_in_caps = Div (logits, cap)",
        "logits_tanh = Tanh (logits_in_caps)",
        "capped_logits = Mul (logits_tanh, cap)",
    ),
    False: ("capped_logits = Identity (logits)",),
}

_BIAS = {
    True: (
        "limit = Constant <value_int: int = @distance_limit> ()",
        "sink_distance_shape = Shape (sink_distance)",
        "sink_seen_distance = Expand (limit, sink_distance_shape)",
        "seen_distance = Concat <axis: int = 2> (sink_seen_distance, ring_distance)",
        # Only distances up to the limit survive the mask; clipping keeps the rest exact too.
        "clipped_distance = Clip (seen_distance, zero, limit)",
        "distance_32 = Cast <to: int = 1> (clipped_distance)",
        "distance_4d = Unsqueeze (distance_32, axis_1)",
        "slopes = Unsqueeze (alibi_slopes, axis_1_2)",
        "alibi = Mul (slopes, distance_4d)",
        "alibi_logits = Sub (capped_logits, alibi)",
        "masked_logits = Add (alibi_logits, mask)",
    ),
    False: ("masked_logits = Add (capped_logits, mask)",),
}

_SOFTMAX = {
    # The learned logit is one more column, dropped after it has entered the denominator.
    True: (
        "sink_logits_4d = Unsqueeze (sink_logits, axis_0_2_3)",
        "column_shape = Concat <axis: int = 0> (heads_and_steps, axis_1)",
        "sink_logits_column = Expand (sink_logits_4d, column_shape)",
        "logits_and_column = Concat <axis: int = 3> (masked_logits, sink_logits_column)",
        "weights_and_column = Softmax <axis: int = 3> (logits_and_column)",
        "weights_32 = Slice (weights_and_column, keep, rest, axis_3)",
    ),
    False: ("weights_32 = Softmax <axis: int = 3> (masked_logits)",),
}

_SPLIT_WEIGHTS = (
    "num_keys = Shape <start: int = 2, end: int = 3> (seen)",
    "weights_shape = Concat <axis: int = 0> (keep, kv_heads, rest, num_keys)",
    "grouped_weights = Reshape (weights, weights_shape)",
    "num_sink_slots_1d = Reshape (num_sink_slots, axis_1)",
    "split_sizes = Concat <axis: int = 0> (num_sink_slots_1d, capacity)",
    "sink_weights, ring_weights = Split <axis: int = 3> (grouped_weights, split_sizes)",
)

_VALUES = {
    False: (
        "weights = CastLike (weights_32, value)",
        *_SPLIT_WEIGHTS,
        "sink_sum = MatMul (sink_weights, present_sink_value)",
        "ring_sum = MatMul (ring_weights, present_value)",
        "grouped_output = Add (sink_sum, ring_sum)",
    ),
    True: (
        "weights = Identity (weights_32)",
        *_SPLIT_WEIGHTS,
        "sink_weights_typed = CastLike (sink_weights, value)",
        "sink_sum_typed = MatMul (sink_weights_typed, present_sink_value)",
        "sink_sum = Cast <to: int = 1> (sink_sum_typed)",
        "ring_value_scale = Transpose <perm: ints = [0, 1, 3, 2]> (present_value_scale)",
        "ring_weights_scaled = Mul (ring_weights, ring_value_scale)",
        "ring_value = Cast <to: int = 1> (present_value)",
        "ring_sum = MatMul (ring_weights_scaled, ring_value)",
        "grouped_output_32 = Add (sink_sum, ring_sum)",
        "grouped_output = CastLike (grouped_output_32, query)",
    ),
}
