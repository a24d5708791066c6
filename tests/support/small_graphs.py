"""Small graphs for tests of passes: in ONNX's text form, and a trace of a model of few layers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

HEADER = '<ir_version: 10, opset_import: ["" : 24]>\n'
LINEAR = (
    HEADER
    + """
g (float[B, S, 6] x) => (float[B, S, 5] y)
<float[5, 6] w, float[5] b>
{
    t = Transpose <perm = [1, 0]> (w)
    m = MatMul (x, t)
    y = Add (m, b)
}"""
)
NORM = (
    HEADER
    + """
g (float[B, S, 6] x) => (float[B, S, 6] y)
<float[6] w, float two = {2.0}, float eps = {0.000001}, int64[1] axes = {-1}>
{
    p = Pow (x, two)
    m = ReduceMean (p, axes)
    a = Add (m, eps)
    s = Sqrt (a)
    r = Reciprocal (s)
    n = Mul (x, r)
    o = Mul (w, n)
    y = Identity (o)
}"""
)
# Gemma's: the scale is 1 + weight, computed in float32 of a weight in half precision.
NORM_OF_ONE_MORE = NORM.replace("float[6] w,", "float16[6] w, float one = {1.0},").replace(
    "o = Mul (w, n)", "c = Cast <to = 1> (w)\n    k = Add (one, c)\n    o = Mul (n, k)"
)
VIEW = (
    HEADER
    + """
g (float[B, S, 6] x) => (float[B, S, 2, 3] y)
<int64[2] tail = {2, 3}>
{
    head = Shape <start = 0, end = 2> (x)
    target = Concat <axis = 0> (head, tail)
    y = Reshape (x, target)
}"""
)


def parsed(text: str) -> ir.Model:
    """Parse a graph, give its weights random values, infer shapes."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    # In the text form a weight is declared like any value; here it becomes an initializer.
    for value in proto.graph.value_info:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        weight = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, value.name))
    del proto.graph.value_info[:]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def toy(count: int, flaw: str = "", sized: int | None = None) -> ir.Model:
    """Build a trace of a model of so many layers `m.layers`, with something that must not be.

    From the layer `sized` on they read one size, which that layer makes; with the flaw "size" it
    makes it of its weight.
    """
    number = ir.TensorType(ir.DataType.FLOAT)
    nodes: list[ir.Node] = []

    def value(name: str) -> ir.Value:
        return ir.Value(name=name, type=number, shape=ir.Shape(["n"]))

    def add(op_type: str, inputs: list[ir.Value], layer: int | None, name: str) -> ir.Value:
        scopes = [""] if layer is None else ["", f"m.layers.{layer}", f"m.layers.{layer}.f"]
        props = {"pkg.torch.onnx.name_scopes": repr(scopes)}
        attributes = {"value_float": 2.0} if op_type == "Constant" else None
        node = ir.node(op_type, inputs, attributes, metadata_props=props)
        (result,) = node.outputs
        result.name, result.type, result.shape = name, number, ir.Shape(["n"])
        nodes.append(node)
        return result

    tokens = value("input_ids")
    weights = [value(f"m.layers.{i}.w") for i in range(count)]
    pasts = [value(f"past_key_values.{i}.key") for i in range(count)]
    shared = add("Neg", [tokens], None, "neg")
    stream, presents, streams = shared, [], []
    for i in range(count):
        if i == 0:
            constant = add("Constant", [], 0, "val_0")
        weight = weights[0] if flaw == "weight" and i else weights[i]
        past = pasts[0] if flaw == "cache" and i else pasts[i]
        first = add("Mul", [stream, weight], i, f"mul_{2 * i}")
        if flaw == "order":
            add("Neg", [shared], None, f"neg_{i + 1}")
        scaled = add("Mul", [first, constant], i, f"mul_{2 * i + 1}")
        if i == sized:
            half = add("Exp", [weight if flaw == "size" else shared], i, "exp_0")
            size = add("Sqrt", [half], i, "sqrt_0")
        if sized is not None and i >= sized:
            scaled = add("Max", [scaled, size], i, f"max_{i}")
        presents.append(add("Sub", [past, scaled], i, f"present.{i}.key"))
        if flaw == "far" and i > 1:
            scaled = add("Max", [scaled, streams[i - 2]], i, f"max_{i}")
        stream = add("Add", [scaled, shared], i, f"add_{i}")
        streams.append(stream)
    logits = add("Abs", [stream], None, "logits")
    if flaw == "output":
        presents.append(streams[0])
    graph = ir.Graph(
        [tokens, *pasts], [logits, *presents], nodes=nodes, opset_imports={"": 24}, name="toy"
    )
    for weight in weights:
        weight.const_value = ir.tensor([1.0], name=weight.name)
        graph.initializers[str(weight.name)] = weight
    return ir.Model(graph, ir_version=11)
