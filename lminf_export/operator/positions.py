"""Positions of tokens and slots and their rotation rows, computed once in a step for all layers.

Two small torch operators with their own translation to ONNX: torch.onnx would turn their
integer divisions into float32 ones, which are wrong from position 2**24 on. Only Gather, Mul,
Add, Sub, Div and Mod on integers and float32 appear in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnxscript.values import Opset
from torch import Tensor

from lminf_export.operator import reference, rope

_ONNX = Opset("", 24)


@torch.library.custom_op("lminf::rotary_rows", mutates_args=())
def rotary_rows(position: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (B, S, R/2) at positions (B, S) int64: see `rope.rotary_rows`."""
    return rope.rotary_rows(position, cos, sin)


@rotary_rows.register_fake
def _(position: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*position.shape, cos.shape[-1])
    return cos.new_empty(shape), sin.new_empty(shape)


@torch.library.custom_op("lminf::token_positions", mutates_args=())
def token_positions(past_length: Tensor, input_ids: Tensor) -> Tensor:
    """past_length + 0 … S−1, (B, S) int64, for input_ids (B, S)."""
    return past_length[:, None] + torch.arange(input_ids.shape[1])


@token_positions.register_fake
def _(past_length: Tensor, input_ids: Tensor) -> Tensor:
    return torch.empty_like(input_ids, memory_format=torch.contiguous_format)


@torch.library.custom_op("lminf::slot_positions", mutates_args=())
def slot_positions(past_length: Tensor, new_length: Tensor, ring: Tensor) -> Tensor:
    """Positions (B, C) of the slots of a ring (B, G, C, D): see `reference.slot_positions`."""
    return reference.slot_positions(past_length, new_length, ring.shape[2])


@slot_positions.register_fake
def _(past_length: Tensor, new_length: Tensor, ring: Tensor) -> Tensor:
    return past_length.new_empty((past_length.shape[0], ring.shape[2]))


def _integers(*values: int) -> Any:
    return _ONNX.Constant(value_ints=values)


def _scalar(value: int) -> Any:
    return _ONNX.Constant(value_int=value)


def _rotary_rows_to_onnx(position: Any, cos: Any, sin: Any) -> Any:
    weights = [rope.BASE**k for k in range(rope.NUM_DIGITS)]
    offsets = [rope.BASE * k for k in range(rope.NUM_DIGITS)]
    shifted = _ONNX.Div(_ONNX.Unsqueeze(position, _integers(-1)), _integers(*weights))
    row = _ONNX.Add(_ONNX.Mod(shifted, _scalar(rope.BASE)), _integers(*offsets))
    c, s = _ONNX.Gather(cos, row), _ONNX.Gather(sin, row)
    for _ in range(int(np.log2(rope.NUM_DIGITS))):
        c0, c1 = _ONNX.Split(c, axis=2, num_outputs=2, _outputs=2)
        s0, s1 = _ONNX.Split(s, axis=2, num_outputs=2, _outputs=2)
        c = _ONNX.Sub(_ONNX.Mul(c0, c1), _ONNX.Mul(s0, s1))
        s = _ONNX.Add(_ONNX.Mul(s0, c1), _ONNX.Mul(c0, s1))
    return _ONNX.Squeeze(c, _integers(2)), _ONNX.Squeeze(s, _integers(2))


def _token_positions_to_onnx(past_length: Any, input_ids: Any) -> Any:
    count = _ONNX.Squeeze(_ONNX.Shape(input_ids, start=1, end=2))
    steps = _ONNX.Range(_scalar(0), count, _scalar(1))
    return _ONNX.Add(_ONNX.Unsqueeze(past_length, _integers(1)), steps)


def _slot_positions_to_onnx(past_length: Any, new_length: Any, ring: Any) -> Any:
    capacity = _ONNX.Squeeze(_ONNX.Shape(ring, start=2, end=3))
    total = _ONNX.Add(past_length, new_length)
    last = _ONNX.Unsqueeze(_ONNX.Sub(total, _scalar(1)), _integers(1))
    # One lap is added so that Mod never sees a negative number: engines differ on those.
    a_lap_on = _ONNX.Add(last, capacity)
    age = _ONNX.Sub(a_lap_on, _ONNX.Range(_scalar(0), capacity, _scalar(1)))
    return _ONNX.Sub(last, _ONNX.Mod(age, capacity))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export(custom_translation_table=…)` needs for these operators."""
    ops = torch.ops.lminf
    return {
        ops.rotary_rows.default: _rotary_rows_to_onnx,
        ops.token_positions.default: _token_positions_to_onnx,
        ops.slot_positions.default: _slot_positions_to_onnx,
    }
