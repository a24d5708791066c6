"""Fused attention brought to one form: queries, keys and values as three inputs of their own."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from lminf_export.errors import ModelError
from lminf_export.rewriting.feeds import Call, Inputs, cache_shape
from lminf_export.rewriting.head_forms import take_out_products, unpack_heads
from lminf_export.rewriting.recording import Recorder
from lminf_export.rewriting.searching import MICROSOFT, node_name

_Q_NORM, _K_NORM = 14, 15
_WINDOW_ONLY = "sliding_window_cache"


def plain_forms(graph: ir.Graph, inputs: Inputs, head_dims: Mapping[str, int]) -> None:
    """Unpack what fused attention takes in one tensor, and norms that are part of it.

    Args:
        graph: it is changed.
        inputs: of the graph.
        head_dims: of caches whose last dimension the graph leaves open.

    Raises:
        ModelError: naming a node that has a form that is not known.
    """
    for node in list(graph):
        kind = node.op_type if node.domain == MICROSOFT else ""
        if kind == "GroupQueryAttention":
            _group_query(graph, node, head_dims)
        elif kind == "MultiHeadAttention":
            unpack_heads(graph, node)
        elif kind == "Attention":
            take_out_products(graph, node, inputs)


def window_of_caches(graph: ir.Graph) -> int | None:
    """Return the longest window of caches that hold a window only, None without such caches."""
    windows = [
        node.attributes.get_int("local_window_size", 0)
        for node in graph
        if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention")
        and node.attributes.get_int(_WINDOW_ONLY)
    ]
    return max(windows, default=None)


def _group_query(graph: ir.Graph, node: ir.Node, head_dims: Mapping[str, int]) -> None:
    # A cache that forgets what left the window is computed as one that does not.
    node.attributes.pop(_WINDOW_ONLY, None)
    inputs = [*node.inputs, *[None] * (17 - len(node.inputs))]
    heads = node.attributes.get_int("num_heads")
    groups = node.attributes.get_int("kv_num_heads")
    op = Recorder()
    query, key, value = inputs[:3]
    if (key is None) != (value is None):
        raise ModelError(
            f"{node_name(node)} has keys without values, or values without keys: it shares those "
            f"of another layer; expected a cache for each layer"
        )
    packed = key is None
    norms = inputs[_Q_NORM], inputs[_K_NORM]
    if not packed and norms == (None, None):
        return
    if inputs[3] is None or inputs[3].shape is None:
        raise ModelError(
            f"{node_name(node)} takes no past keys: export the model with a cache (with-past, "
            f"use_cache)"
        )
    if query is None or not heads or not groups:
        raise ModelError(f"{node_name(node)} has no queries or no number of heads")
    dim = cache_shape(inputs[3], Call(1, 1, head_dims))[3]
    if packed:
        sizes = op.integers(heads * dim, groups * dim, groups * dim)
        query, key, value = op.Split(query, sizes, axis=-1, _outputs=3)
    epsilon = node.attributes.get_float("qk_norm_epsilon", 1e-6)
    for place, (weight, name) in enumerate(zip(norms, ("q", "k"), strict=True)):
        if weight is None:
            continue
        own = node.attributes.get_float(f"{name}_norm_epsilon", epsilon)
        rows = op.Reshape((query, key)[place], op.integers(0, 0, -1, dim))
        normed = op.SimplifiedLayerNormalization(rows, weight, axis=-1, epsilon=own, stash_type=1)
        flat = op.Reshape(normed, op.integers(0, 0, -1))
        query, key = (flat, key) if place == 0 else (query, flat)
    graph.insert_before(node, op.nodes)
    for place, new in enumerate((query, key, value)):
        node.replace_input_with(place, new)
    for place in (_Q_NORM, _K_NORM):
        if place < len(node.inputs):
            node.replace_input_with(place, None)
