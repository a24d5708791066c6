"""Λ-attention over a ring of int8: the specification of the operator that rounds what it keeps.

The format (`quantize`) and `lambda_attention_int8_cache`, which is `reference.lambda_attention`
over a ring in it; keys lie there as they are or without a bias. Letters as in `reference`;
docs/operator.md, "Rings of int8", says why.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lminf_export.operator.reference import (
    attend_caches,
    real_type,
    turned,
    write_ring,
    write_sinks,
)
from lminf_export.operator.rope import rotary_rows

INT8_LIMIT = 127  # symmetric: −128 is not used


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8, symmetrically, with a scale for each: the format of an int8 ring.

    scale = max |x| / 127 and q = x / scale, rounded to the nearest integer, ties to even; a row
    of zeros has scale 0 and zeros. Both divisions are done in the scale's type.

    Args:
        x: (…, D): of one token and key/value head a key, rotated at its position, or a value.

    Returns:
        q (…, D) int8 in −127 … 127 and scale (…, 1) float32, or float64 where x is float64.
    """
    x = x.to(real_type(x))
    scale = x.abs().amax(dim=-1, keepdim=True) / INT8_LIMIT
    steps = (x / scale.masked_fill(scale == 0, 1.0)).round()
    # Only a scale that has lost its bits, below the normal numbers, leaves the limits.
    return steps.clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8), scale


def round_to_int8(x: Tensor) -> Tensor:
    """Return what remains of rows (…, D) in an int8 ring, in float32 or float64."""
    return dequantize(*quantize(x))


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Return what `quantize` stands for: q · scale, (…, D) in the scale's type."""
    return q.to(scale.dtype) * scale


def lambda_attention_int8_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_sink_key: Tensor,
    past_sink_value: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    query_position: Tensor,
    slot_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    limit_cos: Tensor,
    limit_sin: Tensor,
    alibi_slopes: Tensor,
    sink_logits: Tensor,
    past_key_scale: Tensor,
    past_value_scale: Tensor,
    key_bias: Tensor | None = None,
    cos_table: Tensor | None = None,
    sin_table: Tensor | None = None,
    *,
    num_sink_tokens: int,
    window_size: int,
    distance_limit: int,
    scale: float,
    softcap: float,
    rotary_dim: int,
    rotary_interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`lambda_attention` over a ring of int8: new keys and values are rounded, then attended.

    Every query, those of the same chunk included, meets what the ring holds, so the result does
    not depend on how a text is cut into chunks. Sinks stay in the model's type.

    With a bias b of keys, a key k of position p is R_p(k − b) in the ring, rounded; a query meets
    that plus R_p b. In exact arithmetic every b gives the same result; one near the keys' mean
    leaves little to round.

    Args:
        past_key: (B, G, C, D) int8; slot p mod C holds the key of position p, without its bias,
            rotated at p and rounded by `quantize`.
        past_value: (B, G, C, D) int8.
        past_key_scale: (B, G, C, 1) float32 (or float64 where T is), the scales of the keys.
        past_value_scale: like past_key_scale.
        key_bias: (G, D) T, the part b of every key that the ring lacks; None for keys as they are.
        cos_table: (T, R/2) float32 (or float64 where T is), the digit tables of `rope`, from
            which R_p is composed for the positions in the ring; with a key_bias only. Any small
            constant without rotation.
        sin_table: like cos_table.

    The other arguments are those of `lambda_attention`.

    Returns:
        The five of `lambda_attention`, then present_key_scale and present_value_scale.
    """
    turn = partial(turned, rotary_dim=rotary_dim, interleaved=rotary_interleaved)
    local_query, sink_query = turn(query, cos, sin), turn(query, limit_cos, limit_sin)
    real = real_type(query)
    bias = None if key_bias is None else key_bias.to(real)[None, :, None]  # (1, G, 1, D)

    new_key = key if bias is None else key.to(real) - bias
    rounded_key, key_scale = quantize(turn(new_key, cos, sin))
    rounded_value, value_scale = quantize(value.to(real))
    present_key = write_ring(past_key, rounded_key, past_length)
    present_key_scale = write_ring(past_key_scale, key_scale, past_length)
    present_value = write_ring(past_value, rounded_value, past_length)
    present_value_scale = write_ring(past_value_scale, value_scale, past_length)
    present_sink_key = write_sinks(past_sink_key, key, past_length, new_length)
    present_sink_value = write_sinks(past_sink_value, value, past_length, new_length)

    ring_key = dequantize(present_key, present_key_scale)
    if bias is not None:
        assert cos_table is not None
        assert sin_table is not None
        rows = (cos, sin)
        if rotary_dim:
            # An empty slot's position is negative; what is there, no query sees.
            rows = rotary_rows(slot_position.clamp_min(0), cos_table, sin_table)
        ring_key = ring_key + turn(bias.expand(*present_key.shape[:3], -1), *rows)
    output = attend_caches(
        local_query,
        sink_query,
        ring_key,
        dequantize(present_value, present_value_scale),
        present_sink_key,
        present_sink_value,
        query_position,
        slot_position,
        alibi_slopes,
        sink_logits,
        num_sink_tokens=num_sink_tokens,
        window_size=window_size,
        distance_limit=distance_limit,
        scale=scale,
        softcap=softcap,
    )
    return (
        output.to(query.dtype),
        present_key,
        present_value,
        present_sink_key,
        present_sink_value,
        present_key_scale,
        present_value_scale,
    )
