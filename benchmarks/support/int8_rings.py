"""Rings of int8 of a random case: how they start, and the specification over what they hold."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.support.operator_case import Case, History
from lminf_export.operator import reference
from lminf_export.operator.reference_int8 import dequantize, quantize
from lminf_export.operator.rope import rotary_rows


def rounded_caches(history: History, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return ring key, ring value, sinks and the scales as they stand before the first query."""
    _, value, *sinks = history.caches(capacity)
    key = history.without_bias().caches(capacity)[0]
    (key, key_scale), (value, value_scale) = quantize(key), quantize(value)
    return [key, value, *sinks], [key_scale, value_scale]


def attended(
    case: Case, inputs: list[Tensor], caches: list[Tensor], scales: list[Tensor]
) -> Tensor:
    """Return the specification's output (B, H, S, D) over given caches, in float64.

    Args:
        case: sizes and rules of the layer.
        inputs: of the step, in the operator's order.
        caches: ring key, ring value and sinks that queries meet.
        scales: of the rings.
    """
    query, cos, sin, limit_cos, limit_sin = inputs[0].double(), *inputs[11:15]
    turn = partial(reference.turned, rotary_dim=case.rotary_dim, interleaved=case.interleaved)
    attributes: dict[str, Any] = case.attributes()
    del attributes["rotary_dim"], attributes["rotary_interleaved"]
    rings = [dequantize(q, scale.double()) for q, scale in zip(caches[:2], scales, strict=True)]
    if case.key_bias:
        bias, *tables = inputs[19:]
        rows: Any = inputs[11:13]
        if case.rotary_dim:
            rows = rotary_rows(inputs[10].clamp_min(0), *(x.double() for x in tables))
        of_slots = bias.double()[None, :, None].expand_as(rings[0])
        rings[0] = rings[0] + turn(of_slots, *rows)
    return reference.attend_caches(
        turn(query, cos, sin),
        turn(query, limit_cos, limit_sin),
        *rings,
        *(sinks.double() for sinks in caches[2:]),
        *inputs[9:11],
        *inputs[15:17],
        **attributes,
    )
