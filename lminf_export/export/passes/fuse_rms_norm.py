"""x · rsqrt(mean(x²) + ε) · weight, seven nodes as traced, becomes one RMSNormalization."""

from __future__ import annotations

import onnx_ir as ir


def fuse_rms_norm(model: ir.Model) -> None:
    """Replace the traced form of an RMS norm by the standard operator (opset 23).

    Matches weight · cast?(x₃₂ · 1/√(mean(x₃₂²) + ε)) with x₃₂ = x or cast(x), over the last
    axis: the statistics stay in float32 (stash_type 1) and the product with the weight in the
    model's type, as traced.

    Requires: ε and the axis are constants.
    Ensures: the same values; nodes that served only the norm are left to dead-code removal.
    """
    for node in list(model.graph):
        match = _match(node)
        if match is None:
            continue
        x, weight, epsilon = match
        fused = ir.node(
            "RMSNormalization",
            [x, weight],
            attributes={"axis": -1, "epsilon": epsilon, "stash_type": 1},
        )
        old, new = node.outputs[0], fused.outputs[0]
        new.shape, new.type = old.shape, old.type
        model.graph.insert_before(node, fused)
        ir.convenience.replace_all_uses_with(old, new)


def _match(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    if node.op_type != "Mul" or node.outputs[0].is_graph_output():
        return None
    weight, normed = node.inputs
    if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 1:
        weight, normed = normed, weight
    if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 1:
        return None
    product = _through_cast(normed).producer() if normed is not None else None
    if product is None or product.op_type != "Mul":
        return None
    for x, factor in (product.inputs, product.inputs[::-1]):
        epsilon = _epsilon_of_rsqrt(factor, x)
        if epsilon is not None and x is not None:
            source = _through_cast(x)
            if source.dtype == weight.dtype:
                return source, weight, epsilon
    return None


def _through_cast(value: ir.Value) -> ir.Value:
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.inputs[0]
    return value


def _epsilon_of_rsqrt(value: ir.Value | None, x: ir.Value | None) -> float | None:
    """Return ε if value is 1/√(mean(x²) + ε) over the last axis."""
    chain = value
    for op_type in ("Reciprocal", "Sqrt"):
        producer = chain.producer() if chain is not None else None
        if producer is None or producer.op_type != op_type:
            return None
        chain = producer.inputs[0]
    add = chain.producer() if chain is not None else None
    if add is None or add.op_type != "Add":
        return None
    mean, epsilon = add.inputs
    reduce = mean.producer() if mean is not None else None
    if reduce is None or reduce.op_type != "ReduceMean" or _number(reduce.inputs[1]) != -1:
        return None
    power = reduce.inputs[0].producer() if reduce.inputs[0] is not None else None
    if power is None or power.op_type != "Pow" or power.inputs[0] is not x:
        return None
    return _number(epsilon) if _number(power.inputs[1]) == 2 else None


def _number(value: ir.Value | None) -> float | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
