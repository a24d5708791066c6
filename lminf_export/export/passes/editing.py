"""Edits and look-ups that several passes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Say whether there is a node, and it is of that operator."""
    return node is not None and node.op_type == op_type and node.domain == domain


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """Return the node that makes a value, if it is of that operator."""
    node = value.producer() if value is not None else None
    return node if is_op(node, op_type, domain) else None


def rank(value: ir.Value | None) -> int:
    """Return a value's number of dimensions, −1 where it is unknown."""
    return len(value.shape) if value is not None and value.shape is not None else -1


def is_weight(value: ir.Value | None, dimensions: int) -> TypeGuard[ir.Value]:
    """Say whether a value is an initializer of that many dimensions."""
    return value is not None and value.is_initializer() and rank(value) == dimensions


def num_bytes(value: ir.Value) -> int | None:
    """Return the bytes that a tensor of a value's type and shape takes; None where unknown."""
    if value.dtype is None or value.shape is None or not value.shape.is_static():
        return None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.bitwidth / 8)


def name_of(value: ir.Value) -> str:
    """Return the name of a value that has one, as every value of a graph does."""
    assert value.name is not None
    return value.name


def ints(*values: int, as_list: bool = False) -> ir.Node:
    """Return a Constant: int64 of shape (number of values,).

    Args:
        values: the numbers.
        as_list: keep them as a list attribute instead of a tensor. Elimination of common
            subexpressions merges equal constants of one kind only.
    """
    if as_list:
        return ir.node("Constant", [], {"value_ints": list(values)})
    return ir.node("Constant", [], {"value": ir.tensor(np.array(values, dtype=np.int64))})


def const_ints(value: ir.Value | None) -> list[int] | None:
    """Return the numbers of a constant vector, None for any other value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or len(tensor.shape) != 1:
        return None
    return [int(number) for number in tensor.numpy()]


def const_number(value: ir.Value | None) -> float | None:
    """Return the one number of a constant, None for any other value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def add_of(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add that alone reads a value, and what it adds; None if something else reads it.

    The Add is of the value's own graph.
    """
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    add, place = uses[0]
    made_by = value.producer()
    if not is_op(add, "Add") or made_by is None or add.graph is not made_by.graph:
        return None
    other = add.inputs[1 - place]
    return None if other is None else (add, other)


def replace(
    graph: ir.Graph,
    old: ir.Node,
    new: Sequence[ir.Node],
    *,
    absorbed: Sequence[ir.Node] = (),
    keep_name: bool = True,
) -> None:
    """Put nodes in another's place; the last one's result takes over its shape, type and users.

    Args:
        graph: the graph of all of them.
        old: the node that goes; its result may be an output of the graph.
        new: in order, not yet in a graph.
        absorbed: nodes that only fed the old one and go with it.
        keep_name: the result takes over the name too.
    """
    before, after = old.outputs[0], new[-1].outputs[0]
    after.shape, after.type = before.shape, before.type
    if keep_name:
        after.name = before.name
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove([old, *absorbed], safe=True)


def declare_initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """Return the initializer of that name; a new one has no data yet."""
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
    return graph.initializers[name]


def rename_initializer(graph: ir.Graph, old: str, new: str) -> None:
    """Give an initializer another name; it becomes the last of them."""
    value = graph.initializers.pop(old)
    value.name = new
    graph.initializers[new] = value


def attach_function(model: ir.Model, proto: onnx.FunctionProto) -> None:
    """Put a function into the model, in the place of one it has under that identifier."""
    function = ir.serde.deserialize_function(proto)
    model.functions[function.identifier()] = function


def eliminate_identities(model: ir.Model) -> None:
    """Remove what copies a value; in a graph with branches, where no output of it is a copy.

    onnx_ir's pass empties a branch that only hands on a value of the graph around it, which
    onnxruntime does not take.
    """
    attributes = [a for node in model.graph for a in node.attributes.values()]
    if not any(attribute.type == ir.AttributeType.GRAPH for attribute in attributes):
        common.IdentityEliminationPass()(model)
        return
    for node in list(model.graph):
        value = node.inputs[0] if is_op(node, "Identity") else None
        if value is not None and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)
