"""Parts of a graph, cut out and run: what a foreign graph computes is measured, not guessed.

A part is everything between some values that are given and some that are wanted. It runs in
onnxruntime on a CPU; weights stay in their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from lminf_export.errors import ModelError, shortened
from lminf_export.export.passes.checking import inner_graphs
from lminf_export.export.wider_graph import widen
from lminf_export.operator.contract import DOMAIN
from lminf_export.rewriting.lighter import without_products
from lminf_export.runtime.foreign_errors import foreign_errors
from lminf_export.runtime.onnxruntime import weights_of_bytes

Array = NDArray[Any]
NO_PACKED_WEIGHTS = "session.disable_prepacking"
_IR_VERSION = 10
# Computed in float32, so that measurements are exact.
NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that a node reads, those that graphs within it take from outside too."""
    yield from (value for value in node.inputs if value is not None)
    for graph in inner_graphs(node):
        own: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
        for inner in graph:
            yield from (value for value in read_values(inner) if value not in own)
            own.update(inner.outputs)
        yield from (value for value in graph.outputs if value not in own)


def weight_files(model: ir.Model) -> list[str]:
    """Return the names of the files that hold a graph's weights, ascending."""
    return sorted(
        {
            str(value.const_value.location)
            for graph in (model.graph, *model.graph.subgraphs())
            for value in graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
    )


def nodes_between(given: Iterable[ir.Value], wanted: Iterable[ir.Value]) -> list[ir.Node]:
    """Return the nodes that make the wanted values out of the given ones, in the graph's order."""
    known, found = set(given), set[ir.Node]()
    open_values = [value for value in wanted if value not in known]
    graph: ir.Graph | None = None
    while open_values:
        node = open_values.pop().producer()
        if node is None or node in found:
            continue
        found.add(node)
        graph = graph or _graph_of(node)
        open_values += [value for value in read_values(node) if value not in known]
    return [node for node in graph if node in found] if graph is not None else []


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


# What a part gives, and what it is given.
_Key = tuple[tuple[ir.Value, ...], frozenset[ir.Value]]
_Names = dict[ir.Value, str]


@dataclass
class Parts:
    """Runs parts of one graph.

    Attributes:
        model: the graph, which must not change meanwhile.
        folder: of its file, where its weights are.
    """

    model: ir.Model
    folder: Path
    _weights: list[Array] = field(default_factory=list)
    _sessions: dict[bytes, ort.InferenceSession] = field(default_factory=dict)
    _parts: dict[_Key, tuple[_Names, list[str], ort.InferenceSession]] = field(default_factory=dict)

    @cached_property
    def weight_files(self) -> list[str]:
        """Names of the files that hold the graph's weights."""
        return weight_files(self.model)

    def shapes(
        self, wanted: Sequence[ir.Value], given: Mapping[ir.Value, Array]
    ) -> list[tuple[int, ...]]:
        """Return shapes of some values, as `run` would; numbers of products do not count.

        Raises:
            ModelError: as `run`.
        """
        part = _Part(self.model, given, wanted)
        proto = part.proto()
        without_products(proto.graph)
        session = self._open(proto.SerializeToString(), wanted)
        feeds = {part.names[value]: widened_array(given[value]) for value in part.inputs}
        outputs = [part.names[value] for value in wanted]
        return [array.shape for array in _run(session, wanted, outputs, feeds)]

    def run(self, wanted: Sequence[ir.Value], given: Mapping[ir.Value, Array]) -> list[Array]:
        """Return some values of the graph, computed from others.

        Args:
            wanted: values that inputs, weights and the given ones decide.
            given: arrays for values; those that the wanted ones do not need are left out.

        Raises:
            ModelError: onnxruntime cannot run the part, or it needs a value that is not given.
        """
        key = (tuple(wanted), frozenset(given))
        if key not in self._parts:
            part = _Part(self.model, given, wanted)
            proto = part.proto().SerializeToString()
            if proto not in self._sessions:
                self._sessions[proto] = self._open(proto, wanted)
            inputs = {value: part.names[value] for value in part.inputs}
            self._parts[key] = inputs, [part.names[v] for v in wanted], self._sessions[proto]
        inputs, outputs, session = self._parts[key]
        feeds = {name: widened_array(given[value]) for value, name in inputs.items()}
        return _run(session, wanted, outputs, feeds)

    def digest(self, wanted: Sequence[ir.Value], given: Mapping[ir.Value, Array]) -> bytes:
        """Return a hash that is equal for parts that compute the same, whatever their names."""
        return hashlib.sha256(_Part(self.model, given, wanted).proto().SerializeToString()).digest()

    def _open(self, proto: bytes, wanted: Sequence[ir.Value]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._weights += weights_of_bytes(self.folder, self.weight_files, options)
        options.add_session_config_entry(NO_PACKED_WEIGHTS, "1")
        try:
            return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            raise ModelError(_cannot_run(wanted, error)) from error


def _run(
    session: ort.InferenceSession,
    wanted: Sequence[ir.Value],
    outputs: list[str],
    feeds: Mapping[str, Array],
) -> list[Array]:
    try:
        return list(session.run(outputs, dict(feeds)))
    except Exception as error:  # as above
        raise ModelError(_cannot_run(wanted, error)) from error


def _cannot_run(wanted: Sequence[ir.Value], error: Exception) -> str:
    reason = shortened(" ".join(str(error).split()), 200)
    return f"onnxruntime cannot compute {shortened(repr(wanted[0].name), 60)} of it: {reason}"


class _Part:
    """A part as a model whose names are counted, so that equal parts are equal bytes."""

    def __init__(
        self, model: ir.Model, given: Mapping[ir.Value, Array], wanted: Sequence[ir.Value]
    ) -> None:
        self.model, self.given, self.wanted = model, given, wanted
        self.nodes = nodes_between(given, wanted)
        self.names: dict[ir.Value, str] = {}
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        made: set[ir.Value] = set()
        for node in self.nodes:
            for value in read_values(node):
                if value not in made:
                    self._meet(value)
            new = [value for value in node.outputs if value not in given]
            made.update(new)
            for value in new:
                self._name(value)
        for value in wanted:
            if value not in made:
                self._meet(value)

    def _name(self, value: ir.Value) -> None:
        self.names.setdefault(value, f"v{len(self.names)}")

    def _meet(self, value: ir.Value) -> None:
        if value in self.names:
            return
        self._name(value)
        if value in self.given:
            self.inputs.append(value)
        elif value.const_value is not None:
            self.initializers.append(value)
        else:
            raise ModelError(f"{shortened(repr(value.name), 60)} is read and nothing gives it")

    def proto(self) -> onnx.ModelProto:
        """Return the part as a model."""
        graph = onnx.GraphProto(name="part")
        graph.node.extend(self._node(node, count) for count, node in enumerate(self.nodes))
        for value in self.initializers:
            assert value.const_value is not None
            with foreign_errors(ModelError, f"the weight {shortened(repr(value.name), 40)}"):
                tensor = ir.serde.serialize_tensor(value.const_value)
            tensor.name = self.names[value]
            graph.initializer.append(tensor)
        for value in self.inputs:
            array = widened_array(self.given[value])
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            shape = [None] * array.ndim
            graph.input.append(onnx.helper.make_tensor_value_info(self.names[value], kind, shape))
        for value in self.wanted:
            graph.output.append(onnx.ValueInfoProto(name=self.names[value]))
        opsets = [
            onnx.helper.make_opsetid(domain, version)
            for domain, version in self.model.opset_imports.items()
            if domain != DOMAIN
        ]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        widen(model, NARROW)
        return model

    def _node(self, node: ir.Node, count: int) -> onnx.NodeProto:
        with foreign_errors(ModelError, f"the node {shortened(repr(node.name), 40)}"):
            proto = ir.serde.serialize_node(node)
        proto.name, proto.doc_string = f"n{count}", ""
        del proto.metadata_props[:]
        for index, value in enumerate(node.inputs):
            if value is not None:
                proto.input[index] = self.names[value]
        for index, value in enumerate(node.outputs):
            unused = not value.name or value in self.given  # what is given comes from outside
            proto.output[index] = "" if unused else self.names[value]
        captured = {str(value.name): self.names[value] for value in read_values(node) if value.name}
        for attribute in proto.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, captured)
        return proto


def _rename(graph: onnx.GraphProto, captured: Mapping[str, str]) -> None:
    """Give the values that a graph takes from outside their new names."""
    own = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    own |= {name for node in graph.node for name in node.output}
    rest = {old: new for old, new in captured.items() if old not in own}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = rest.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, rest)
    for value in graph.output:
        value.name = rest.get(value.name, value.name)


def widened_array(array: Array) -> Array:
    """Return an array of low precision as one of float32."""
    narrow = array.dtype.itemsize == 2 and array.dtype.kind in "fV"
    return array.astype(np.float32) if narrow else array
