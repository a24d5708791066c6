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


def onnx_rotary_rows(op: Any, position: Any, cos: Any, sin: Any) -> Any:
    """Compute `rotary_rows` in ONNX.

    Args:
        op: a set of operators of opset 24; `op.Add(a, b)` puts an Add into a graph.
        position: (B, S) int64.
        cos: (4·1024, R/2) float32.
        sin: like cos.
    """
    weights = [rope.BASE**k for k in range(rope.NUM_DIGITS)]
    offsets = [rope.BASE * k for k in range(rope.NUM_DIGITS)]
    shifted = op.Div(op.Unsqueeze(position, _integers(op, -1)), _integers(op, *weights))
    row = op.Add(op.Mod(shifted, _scalar(op, rope.BASE)), _integers(op, *offsets))
    c, s = op.Gather(cos, row), op.Gather(sin, row)
    for _ in range(int(np.log2(rope.NUM_DIGITS))):
        c0, c1 = op.Split(c, axis=2, num_outputs=2, _outputs=2)
        s0, s1 = op.Split(s, axis=2, num_outputs=2, _outputs=2)
        c = op.Sub(op.Mul(c0, c1), op.Mul(s0, s1))
        s = op.Add(op.Mul(s0, c1), op.Mul(c0, s1))
    return op.Squeeze(c, _integers(op, 2)), op.Squeeze(s, _integers(op, 2))


def onnx_token_positions(op: Any, past_length: Any, input_ids: Any) -> Any:
    """Compute `token_positions` in ONNX, as `onnx_rotary_rows`."""
    count = op.Squeeze(op.Shape(input_ids, start=1, end=2))
    steps = op.Range(_scalar(op, 0), count, _scalar(op, 1))
    return op.Add(op.Unsqueeze(past_length, _integers(op, 1)), steps)


def onnx_slot_positions(op: Any, past_length: Any, new_length: Any, ring: Any) -> Any:
    """Compute `slot_positions` in ONNX, as `onnx_rotary_rows`.

    A size that Shape yields lies in main memory. What is computed with it and with lengths would
    make onnxruntime copy it to the GPU in every step, and refuse to capture a CUDA graph: so the
    size is read off the slots, which Range writes where the lengths are.
    """
    size = op.Squeeze(op.Shape(ring, start=2, end=3))
    slots = op.Range(_scalar(op, 0), size, _scalar(op, 1))
    capacity = op.Add(op.Gather(slots, _integers(op, -1)), _integers(op, 1))
    total = op.Add(past_length, new_length)
    last = op.Unsqueeze(op.Sub(total, _scalar(op, 1)), _integers(op, 1))
    # One lap is added so that Mod never sees a negative number: engines differ on those.
    a_lap_on = op.Add(last, capacity)
    age = op.Sub(a_lap_on, slots)
    return op.Sub(last, op.Mod(age, capacity))


def _integers(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=values)


def _scalar(op: Any, value: int) -> Any:
    return op.Constant(value_int=value)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export(custom_translation_table=…)` needs for these operators."""
    ops = torch.ops.lminf
    return {
        ops.rotary_rows.default: _of_torch(onnx_rotary_rows),
        ops.token_positions.default: _of_torch(onnx_token_positions),
        ops.slot_positions.default: _of_torch(onnx_slot_positions),
    }


def _of_torch(compute: Callable[..., Any]) -> Callable[..., Any]:
    def translation(*values: Any) -> Any:
        return compute(_ONNX, *values)

    return translation
