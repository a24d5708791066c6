"""Caches that lie otherwise than (B, G, P, D), seen as if they lay so.

What is measured gives an attention keys and values of its own. For a cache of another layout a
value of the usual one is put between the graph's input and all that reads it, and turned back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from lminf_export.rewriting.feeds import Inputs, cache_axis
from lminf_export.rewriting.recording import Recorder


def view_caches(graph: ir.Graph, inputs: Inputs) -> Inputs:
    """Give every cache of another layout a value in the usual one.

    Args:
        graph: it is changed, not what it computes.
        inputs: of the graph.

    Returns:
        The inputs, which know those values.
    """
    views: dict[ir.Value, tuple[ir.Value, ...]] = {}
    for value in inputs.caches:
        assert value.shape is not None
        if len(value.shape) == 5:
            views[value] = _two(graph, value)
        elif cache_axis(value) == 1:
            views[value] = _heads_first(graph, value)
    return replace(inputs, views=views)


def _heads_first(graph: ir.Graph, value: ir.Value) -> tuple[ir.Value, ...]:
    """(B, P, G, D) → (B, G, P, D)."""
    assert value.shape is not None
    batch, slots, heads, dim = value.shape
    op = Recorder()
    view = op.Transpose(value, perm=[0, 2, 1, 3])
    _describe(view, value, str(value.name), (batch, heads, slots, dim))
    _put(graph, value, op, op.Transpose(view, perm=[0, 2, 1, 3]))
    return (view,)


def _two(graph: ir.Graph, value: ir.Value) -> tuple[ir.Value, ...]:
    """(2, B, G, P, D) → keys and values (B, G, P, D)."""
    assert value.shape is not None
    op = Recorder()
    parts = op.Split(value, axis=0, num_outputs=2, _outputs=2)
    views = tuple(op.Squeeze(part, op.integers(0)) for part in parts)
    for view, kind in zip(views, ("key", "value"), strict=True):
        _describe(view, value, f"{value.name}.{kind}", tuple(value.shape)[1:])
    back = op.Concat(*(op.Unsqueeze(view, op.integers(0)) for view in views), axis=0)
    _put(graph, value, op, back)
    return views


def _describe(
    view: ir.Value, value: ir.Value, name: str, shape: Sequence[int | ir.SymbolicDim]
) -> None:
    assert value.dtype is not None
    view.name, view.dtype = f"{name}.view", value.dtype
    view.shape = ir.Shape(shape)


def _put(graph: ir.Graph, value: ir.Value, op: Recorder, back: ir.Value) -> None:
    """Let what reads a cache read what it is turned back to."""
    readers = list(value.uses())
    first = op.nodes[0]
    for use in readers:
        if use.node is not first:
            use.node.replace_input_with(use.idx, back)
    graph.insert_before(graph[0], op.nodes)
