"""The lines of the body over a ring of int8 that differ where keys lie there without their bias.

Lines of `attention_body`: R_p(k − b) is rounded and written, R_p(k − b) + R_p b is attended.
"""

from __future__ import annotations

from lminf_export.operator.rope import BASE, NUM_DIGITS

_LEVELS = NUM_DIGITS.bit_length() - 1  # digits are joined in pairs

_BIAS = (
    "key_bias_32 = Cast <to: int = 1> (key_bias)",
    "axis_0_2 = Constant <value_ints: ints = [0, 2]> ()",
    "key_bias_4d = Unsqueeze (key_bias_32, axis_0_2)",
    "whole_key_32 = Cast <to: int = 1> (key)",
)
# rope.rotary_rows of the slots, then the bias rotated at each. An empty slot's position is
# negative; what is there, no query sees.
_SLOT_BIAS = (
    "slot_of_token = Max (slot_position, zero)",
    "slot_column = Unsqueeze (slot_of_token, axis_2)",
    f"digit_weights = Constant <value_ints: ints = {[BASE**k for k in range(NUM_DIGITS)]}> ()",
    f"digit_base = Constant <value_int: int = {BASE}> ()",
    f"digit_offsets = Constant <value_ints: ints = {[BASE * k for k in range(NUM_DIGITS)]}> ()",
    "slot_shifted = Div (slot_column, digit_weights)",
    "slot_digits = Mod (slot_shifted, digit_base)",
    "slot_rows = Add (slot_digits, digit_offsets)",
    "slot_cos_0 = Gather (cos_table, slot_rows)",
    "slot_sin_0 = Gather (sin_table, slot_rows)",
    *(
        line.format(i=i, j=i + 1)
        for i in range(_LEVELS)
        for line in (
            "cos_a_{i}, cos_b_{i} = Split <axis: int = 2, num_outputs: int = 2> (slot_cos_{i})",
            "sin_a_{i}, sin_b_{i} = Split <axis: int = 2, num_outputs: int = 2> (slot_sin_{i})",
            "cos_cos_{i} = Mul (cos_a_{i}, cos_b_{i})",
            "sin_sin_{i} = Mul (sin_a_{i}, sin_b_{i})",
            "sin_cos_{i} = Mul (sin_a_{i}, cos_b_{i})",
            "cos_sin_{i} = Mul (cos_a_{i}, sin_b_{i})",
            "slot_cos_{j} = Sub (cos_cos_{i}, sin_sin_{i})",
            "slot_sin_{j} = Add (sin_cos_{i}, cos_sin_{i})",
        )
    ),
    f"slot_cos = Squeeze (slot_cos_{_LEVELS}, axis_2)",
    f"slot_sin = Squeeze (slot_sin_{_LEVELS}, axis_2)",
    "batch = Shape <start: int = 0, end: int = 1> (query)",
    "slot_bias_shape = Concat <axis: int = 0> (batch, kv_heads, capacity, head_dim)",
    "slot_bias_rows = Expand (key_bias_4d, slot_bias_shape)",
    "slot_bias = RotaryEmbedding <interleaved: int = @rotary_interleaved,"
    " rotary_embedding_dim: int = @rotary_dim> (slot_bias_rows, slot_cos, slot_sin)",
)


def new_key(rotation: tuple[str, ...], rounded: tuple[str, ...]) -> tuple[str, ...]:
    """Return the lines that rotate queries and the new key, which loses its bias first.

    Args:
        rotation: the lines without a bias.
        rounded: the line that makes float32 of a key that is not rotated, if there is one.
    """
    return (
        *_BIAS,
        *(
            line.replace("Cast <to: int = 1> (key)", "Sub (whole_key_32, key_bias_4d)")
            for line in (*rotation, *rounded)
        ),
    )


def products(lines: tuple[str, ...], *, rotary: bool) -> tuple[str, ...]:
    """Return the lines of products with keys: those of the ring get their bias back first.

    Args:
        lines: the lines without a bias.
        rotary: keys are rotated.
    """
    own = {
        "ring_key_t_int8": (
            *(_SLOT_BIAS if rotary else ("slot_bias = Identity (key_bias_4d)",)),
            "ring_key_integers = Cast <to: int = 1> (present_key)",
            "ring_key_rest = Mul (ring_key_integers, present_key_scale)",
            "ring_key_32 = Add (ring_key_rest, slot_bias)",
        ),
        "ring_key_t": ("ring_key_t = Transpose <perm: ints = [0, 1, 3, 2]> (ring_key_32)",),
        "ring_key_scale": (),
        "ring_steps": (),
        "ring_product": ("ring_product = MatMul (local_query, ring_key_t)",),
    }
    return tuple(new for line in lines for new in own.get(line.split(" = ")[0], (line,)))
