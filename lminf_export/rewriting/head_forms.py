"""MultiHeadAttention and the Attention that holds its products, brought to one form."""

from __future__ import annotations

import onnx_ir as ir

from lminf_export.errors import ModelError
from lminf_export.rewriting.feeds import Inputs
from lminf_export.rewriting.recording import Recorder
from lminf_export.rewriting.searching import MICROSOFT, node_name

_BIAS, _PADDING = 3, 4
_FLAT = (0, 0, -1)


def unpack_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Give a node MultiHeadAttention queries, keys and values of their own, and no bias of them.

    Raises:
        ModelError: it has a bias for keys of a layout that it is not added to.
    """
    query, key, value, bias = [*node.inputs, *[None] * 4][:4]
    packed = key is None or value is None
    if query is None or not (packed or bias is not None):
        return
    op = Recorder()
    if key is None:
        query, key, value = _apart(op, query, 3)
    elif value is None:
        key, value = _apart(op, key, 2)
    if bias is not None:
        query, key, value = _biased(op, node, bias, query, key, value)
    graph.insert_before(node, op.nodes)
    for place, new in enumerate((query, key, value)):
        node.replace_input_with(place, new)
    if bias is not None:
        node.replace_input_with(_BIAS, None)


def _apart(op: Recorder, packed: ir.Value, count: int) -> tuple[ir.Value, ...]:
    """Split (B, S, H, count, D) into tensors (B, S, H·D)."""
    parts = op.Split(packed, op.integers(*[1] * count), axis=3, _outputs=count)
    return tuple(op.Reshape(part, op.integers(*_FLAT)) for part in parts)


def _biased(
    op: Recorder, node: ir.Node, bias: ir.Value, *tensors: ir.Value | None
) -> tuple[ir.Value, ...]:
    width = None if bias.shape is None else bias.shape[0]
    four = any(t is not None and t.shape is not None and len(t.shape) == 4 for t in tensors)
    if not isinstance(width, int) or width % 3 or four:
        raise ModelError(
            f"{node_name(node)} has a bias that is not one for queries, keys and values (batch, "
            f"tokens, features) of one width"
        )
    parts = op.Split(bias, op.integers(*[width // 3] * 3), axis=0, _outputs=3)
    return tuple(op.Add(t, part) for t, part in zip(tensors, parts, strict=True))


def take_out_products(graph: ir.Graph, node: ir.Node, inputs: Inputs) -> None:
    """Write a node Attention, which holds weights, as a product and MultiHeadAttention.

    Raises:
        ModelError: it rotates by itself, shares buffers, or has no cache among the inputs.
    """
    source, weights, bias, mask, past, attention_bias = [*node.inputs, *[None] * 6][:6]
    attributes = node.attributes
    if attributes.get_int("do_rotary", 0) or attributes.get_int("past_present_share_buffer", 0):
        raise ModelError(
            f"{node_name(node)} rotates, or shares its cache's buffer, by itself (do_rotary, "
            f"past_present_share_buffer), which no CPU runs; export the model with "
            f"GroupQueryAttention, or MultiHeadAttention behind RotaryEmbedding"
        )
    views = _views(inputs, past)
    rank = -1 if mask is None or mask.shape is None else len(mask.shape)
    width = None if weights is None or weights.shape is None else weights.shape[1]
    if source is None or weights is None or views is None or not isinstance(width, int):
        raise ModelError(
            f"{node_name(node)} has no cache (2, batch, heads, tokens, dimension) among the "
            f"graph's inputs: export the model with a cache"
        )
    if mask is not None and rank not in (1, 2, 3):
        raise ModelError(
            f"{node_name(node)} has a mask of rank {rank}; expected one of rank 1 to 3"
        )
    sizes = attributes.get_ints("qkv_hidden_sizes") or [width // 3] * 3
    op = Recorder()
    product = op.MatMul(source, weights)
    product = product if bias is None else op.Add(product, bias)
    operands = op.Split(product, op.integers(*sizes), axis=-1, _outputs=3)
    kept = {
        name: attributes[name]
        for name in ("num_heads", "scale", "mask_filter_value", "unidirectional")
        if name in attributes
    }
    fused = ir.Node(
        MICROSOFT,
        "MultiHeadAttention",
        [*operands, None, mask, attention_bias, *views],
        kept.values(),
        num_outputs=3,
        name=node.name,
    )
    op.nodes.append(fused)
    output, *present = fused.outputs
    if node.outputs[0].dtype is not None:
        output.dtype = node.outputs[0].dtype
    together = op.Concat(*(op.Unsqueeze(x, op.integers(0)) for x in present), axis=0)
    graph.insert_before(node, op.nodes)
    for old, new in zip(node.outputs, (output, together), strict=False):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _views(inputs: Inputs, past: ir.Value | None) -> tuple[ir.Value, ...] | None:
    """Return keys and values of a cache of both."""
    made_by = None if past is None else past.producer()
    if made_by is None:
        return None
    sides = [None if v is None else v.producer() for v in made_by.inputs]
    read = tuple(side.inputs[0] for side in sides if side is not None and side.inputs)
    return next((views for views in inputs.views.values() if views == read), None)
