"""The graph TensorRT builds from with the plugin: one `LambdaAttention` node for every layer.

Without the operator's function body nothing but the plugin can take the nodes, whatever a
release's parser prefers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from lminf_export.engine.common import EngineRequest, freeze_sizes, load_graph, save_graph
from lminf_export.errors import EngineError
from lminf_export.operator import bindings, contract

_CACHES = (*bindings.RING_KINDS, *bindings.SINK_KINDS)
# Places of the caches among the node's inputs and outputs.
CACHE_INPUTS = {kind: contract.input_names().index(f"past_{kind}") for kind in _CACHES}
CACHE_OUTPUTS = {kind: contract.output_names().index(f"present_{kind}") for kind in _CACHES}

# Parsers hand attributes to a plugin as 32-bit integers.
_MAX_ATTRIBUTE = 2**31 - 1
_RMS_NORM = "RMSNormalization"
_FLOAT32 = int(ir.DataType.FLOAT)


def prepare_for_plugin(onnx_path: Path, out_path: Path, request: EngineRequest) -> None:
    """Write the graph for a TensorRT that has the plugin; the weights stay where they are.

    The operator's function body goes, ring dimensions become numbers, and RMSNormalization,
    which parsers know from 10.15 on, becomes the operators it is made of.

    Requires: the graph is one of `graph.write_graph`.
    Ensures: the same values once the operator's body is put back.

    Args:
        onnx_path: the exported graph.
        out_path: where to write; in the same folder, since weights are found relative to it.
        request: whose layers the nodes must be.

    Raises:
        EngineError: the graph cannot be read or written, is not one of ours, or has a setting
            beyond what a parser can pass to a plugin.
    """
    assert out_path.parent.resolve() == onnx_path.parent.resolve(), "weights would be lost"
    model = load_graph(onnx_path)
    for identifier in [
        key for key in model.functions if key[:2] == (contract.DOMAIN, contract.OP_TYPE)
    ]:
        del model.functions[identifier]
    ir_passes.InlinePass()(model)
    _check_nodes(model, onnx_path, request)
    freeze_sizes(model, onnx_path, request)
    for node in [node for node in model.graph if node.op_type == _RMS_NORM and not node.domain]:
        _expand_rms_norm(model, node)
    save_graph(model, out_path)


def _check_nodes(model: ir.Model, path: Path, request: EngineRequest) -> None:
    """Every layer must have its node, between that layer's caches."""
    nodes = [n for n in model.graph if (n.domain, n.op_type) == (contract.DOMAIN, contract.OP_TYPE)]
    found: dict[str, str] = {}
    for index, node in enumerate(nodes):
        _check_attributes(node, path)
        # A node is named after its first output: let messages say which layer it is.
        node.outputs[0].name = f"lambda_attention.{index}"
        found |= cache_updates(
            [value.name if value is not None else None for value in node.inputs],
            [value.name for value in node.outputs],
        )
    wanted = request.contract.ring_updates() | request.contract.sink_updates()
    missing = wanted.items() - found.items()
    if missing or len(nodes) != len(request.contract.layers):
        what = f", {min(missing)[0]} is not updated by one" if missing else ""
        raise EngineError(
            f"{path}: the graph has {len(nodes)} {contract.OP_TYPE} nodes for "
            f"{len(request.contract.layers)} layers{what}; export the model again"
        )


def cache_updates(inputs: Sequence[str | None], outputs: Sequence[str | None]) -> dict[str, str]:
    """Return past name → present name of one node, from the names of its inputs and outputs."""
    pairs = ((inputs[CACHE_INPUTS[kind]], outputs[CACHE_OUTPUTS[kind]]) for kind in CACHE_INPUTS)
    return {past: present for past, present in pairs if past and present}


def _check_attributes(node: ir.Node, path: Path) -> None:
    for name, attribute in node.attributes.items():
        value = attribute.value
        if isinstance(value, int) and abs(value) > _MAX_ATTRIBUTE:
            raise EngineError(
                f"{path}: {name}={value} of {node.name} is more than a plugin can be told "
                f"({_MAX_ATTRIBUTE}); export with a smaller one, or build with --plugin none"
            )


def _expand_rms_norm(model: ir.Model, node: ir.Node) -> None:
    """Write x · scale / √(mean(x²) + ε), the mean in float32, with operators of opset 18."""
    x, scale = node.inputs
    assert x is not None
    assert scale is not None
    axis = node.attributes.get_int("axis", -1)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    assert axis == -1, "the exporter writes no other"
    dtype = x.dtype or scale.dtype
    assert dtype is not None, "a scale is a weight of known type"
    tape = ir.tape.Tape(model.graph)
    wide = tape.op("Cast", [x], {"to": _FLOAT32})
    square = tape.op("Mul", [wide, wide])
    axes = tape.initializer(ir.tensor([-1], ir.DataType.INT64, name=f"{_name(node)}.axes"))
    mean = tape.op("ReduceMean", [square, axes], {"keepdims": 1})
    tiny = tape.initializer(ir.tensor([epsilon], ir.DataType.FLOAT, name=f"{_name(node)}.epsilon"))
    root = tape.op("Sqrt", [tape.op("Add", [mean, tiny])])
    narrow = tape.op("Cast", [tape.op("Div", [wide, root])], {"to": int(dtype)})
    result = tape.op("Mul", [narrow, scale])
    for index, value in enumerate(part for made in tape.nodes for part in made.outputs):
        value.name = f"{_name(node)}.{index}"
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], tape.nodes, node.outputs, [result]
    )


def _name(node: ir.Node) -> str:
    name = node.outputs[0].name
    assert name is not None, "every value of a written graph has a name"
    return name
