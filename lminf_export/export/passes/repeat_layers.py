"""From a graph of a model's first layers to that of all: copies of a layer's nodes for those alike.

A layer's nodes stand together, as traced. What they read from outside is the stream of tokens
(one tensor, from the layer before), the layer's own weights and caches, and what all layers
share: results from before the layers, and constants. That is checked, not assumed. A product of
sizes, too, is shared: a trace makes it in the first layer that asks for it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lminf_export.export.passes import editing
from lminf_export.export.passes.checking import ensure, ensure_sound, inner_graphs, require
from lminf_export.export.trace.layer_records import UnlikeLayersError
from lminf_export.operator import bindings

# Where torch's exporter keeps the paths of the modules that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class RepeatLayersPass(ir.passes.InPlacePass):
    """Append copies of layers to those a graph has.

    Requires: the first layer is not to be copied.
    Ensures: every layer that has a name in the order has caches among inputs and outputs;
        initializers stand in that order.

    Attributes:
        stack: path of the list of layers in the module that was traced.
        templates: for each layer that follows, which of the graph's is copied; not the first.
        order: names of initializers in the order in which a trace of all layers has them.

    Raises:
        UnlikeLayersError: the graph does not fall into layers as it should; it is as it was.
    """

    stack: str
    templates: Sequence[int]
    order: Sequence[str]

    def requires(self, model: ir.Model) -> None:
        first = min(self.templates, default=1) < 1
        require(not first, "the first layer reads what no other does; it is no template")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        layers, behind = _split(graph, self.stack)
        layers = _without_shared(layers, self.stack)
        entries = _entries(graph, layers, behind)
        for template in set(self.templates):
            _check_inputs(layers[template], template, self.stack)
        readers = set(_walk(behind))
        end = entries[len(layers)]
        uses = [use for use in end.uses() if use.node in readers]
        stream, last = end, layers[-1][-1]
        for index, template in enumerate(self.templates, len(layers)):
            copies = _own_tensors(graph, template, index, self.stack)
            copies[entries[template]] = stream
            nodes = _copy(layers[template], copies, str(index))
            graph.insert_after(last, nodes)
            _add_outputs(graph, template, index, copies)
            stream, last = copies[entries[template + 1]], nodes[-1]
        for use in uses:
            use.node.replace_input_with(use.idx, stream)
        _sort_initializers(graph, self.order)
        return ir.passes.PassResult(model, bool(self.templates))

    def ensures(self, model: ir.Model) -> None:
        ensure_sound(model)
        known = _places(self.order)
        places = [known.get(name, len(known)) for name in model.graph.initializers]
        ensure(places == sorted(places), "initializers do not stand in the order given")
        wanted = _numbers(self.order, f"{self.stack}.")
        for values, prefix in (
            (model.graph.inputs, bindings.PAST),
            (model.graph.outputs, bindings.PRESENT),
        ):
            found = _numbers([editing.name_of(value) for value in values], prefix)
            ensure(found == wanted, f"layers {sorted(found)} of {sorted(wanted)} have {prefix}*")


def _numbers(names: Iterable[str], prefix: str) -> set[int]:
    """Return the layers that names with a prefix belong to."""
    rest = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return {int(number) for number in (name.partition(".")[0] for name in rest)}


def _split(graph: ir.Graph, stack: str) -> tuple[list[list[ir.Node]], list[ir.Node]]:
    """Return the nodes of each layer, and those behind all layers."""
    layers: list[list[ir.Node]] = []
    behind: list[ir.Node] = []
    for node in graph:
        layer = _layer_of(node, stack)
        if layer is None:
            if layers:
                behind.append(node)
            continue
        if behind or layer not in (len(layers) - 1, len(layers)):
            raise UnlikeLayersError(f"{node.name} of layer {layer} stands among other nodes")
        if layer == len(layers):
            layers.append([])
        layers[layer].append(node)
    return layers, behind


def _layer_of(node: ir.Node, stack: str) -> int | None:
    for scope in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")):
        path, _, number = scope.rpartition(".")
        if path == stack and number.isdecimal():
            return int(number)
    return None


def _without_shared(layers: list[list[ir.Node]], stack: str) -> list[list[ir.Node]]:
    """Leave out what later layers read too and what is made of nothing that a layer has."""
    home: dict[ir.Value, int] = {}
    bound: set[ir.Value] = set()  # made of a layer's weights, caches, or what is made of those
    shared: set[ir.Node] = set()
    for layer, nodes in enumerate(layers):
        for node in nodes:
            read = _read([node])
            asked = [v for v in read if v in home and v not in bound and home[v] != layer]
            while asked:
                maker = asked.pop().producer()
                if maker is not None and maker not in shared:
                    shared.add(maker)
                    asked += [value for value in _read([maker]) if value in home]
            home |= dict.fromkeys(node.outputs, layer)
            if any(value in bound or _is_own(value, stack) for value in read):
                bound |= {*node.outputs}
    return [[node for node in nodes if node not in shared] for nodes in layers]


def _is_own(value: ir.Value, stack: str) -> bool:
    """Whether a weight or a cache of some layer."""
    return _belongs(value, f"{stack}.") or _belongs(value, bindings.PAST)


def _entries(
    graph: ir.Graph, layers: list[list[ir.Node]], behind: list[ir.Node]
) -> dict[int, ir.Value]:
    """Return the one tensor that each layer but the first gets, and what is behind all of them."""
    home = {v: layer for layer, nodes in enumerate(layers) for node in nodes for v in node.outputs}
    for output in graph.outputs:
        if output in home and not _belongs(output, bindings.present_name(home[output], "")):
            raise UnlikeLayersError(f"{output.name} comes from layer {home[output]}")
    entries = {}
    for layer, nodes in enumerate([*layers[1:], behind], 1):
        read = [v for v in _read(nodes) if v in home and not _is_constant(v)]
        if [home[value] for value in read] != [layer - 1]:
            raise UnlikeLayersError(f"{len(read)} tensors of other layers lead to layer {layer}")
        (entries[layer],) = read
    kinds = {(value.dtype, str(value.shape)) for value in entries.values()}
    if len(kinds) != 1:
        raise UnlikeLayersError(f"the stream changes from layer to layer: {kinds}")
    return entries


def _check_inputs(nodes: Iterable[ir.Node], layer: int, stack: str) -> None:
    """Check that a layer reads no other layer's weights or caches."""
    own = f"{stack}.{layer}.", bindings.past_name(layer, "")
    for value in _read(nodes):
        if _is_own(value, stack) and not any(_belongs(value, prefix) for prefix in own):
            raise UnlikeLayersError(f"layer {layer} reads {value.name}")


def _own_tensors(graph: ir.Graph, layer: int, index: int, stack: str) -> dict[ir.Value, ir.Value]:
    """Give a layer weights and caches like another's; return the other's → its own."""
    copies = {}
    for old, new in (
        (f"{stack}.{layer}.", f"{stack}.{index}."),
        (bindings.past_name(layer, ""), bindings.past_name(index, "")),
    ):
        for value in (*graph.initializers.values(), *graph.inputs):
            if _belongs(value, old):
                assert value.name is not None
                name = new + value.name.removeprefix(old)
                copy = ir.Value(name=name, shape=value.shape, type=value.type)
                copies[value] = copy
                if value.is_initializer():
                    graph.initializers[name] = copy
                else:
                    graph.inputs.append(copy)
    return copies


def _add_outputs(graph: ir.Graph, layer: int, index: int, copies: dict[ir.Value, ir.Value]) -> None:
    """Make caches that a copied layer writes outputs of the graph, named as its own."""
    old, new = bindings.present_name(layer, ""), bindings.present_name(index, "")
    for value in list(graph.outputs):
        if _belongs(value, old):
            assert value.name is not None
            copies[value].name = new + value.name.removeprefix(old)
            graph.outputs.append(copies[value])


def _copy(nodes: Sequence[ir.Node], copies: dict[ir.Value, ir.Value], mark: str) -> list[ir.Node]:
    """Copy nodes.

    Args:
        nodes: of one graph.
        copies: value that they read from elsewhere → its replacement, where there is one; their
            results and copies are added.
        mark: suffix of the copies' names.
    """
    outside = _read(nodes)
    # A copied graph stands alone; its inputs are then the values of the graph it goes to.
    copied = ir.GraphView(outside, [], nodes=nodes).clone()
    for value, stand_in in zip(outside, list(copied.inputs), strict=True):
        ir.convenience.replace_all_uses_with(stand_in, copies.get(value, value))
    fresh = list(copied)
    copied.remove(fresh)
    for old, new in zip(nodes, fresh, strict=True):
        new.name = f"{old.name}.{mark}"
        for result, copy in zip(old.outputs, new.outputs, strict=True):
            copy.name = f"{result.name}.{mark}"
            copies[result] = copy
    return fresh


def _sort_initializers(graph: ir.Graph, order: Sequence[str]) -> None:
    places = _places(order)
    values = sorted(graph.initializers.values(), key=lambda v: places.get(str(v.name), len(places)))
    graph.initializers.clear()
    for value in values:
        graph.initializers[str(value.name)] = value


def _places(order: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(order)}


def _read(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """Return the values that nodes, and the graphs within them, take from elsewhere, in order."""
    read: dict[ir.Value, None] = {}
    made: set[ir.Value] = set()
    for node in _walk(nodes):
        read |= {value: None for value in node.inputs if value is not None}
        made |= {*node.outputs}
        for graph in inner_graphs(node):
            made |= {*graph.inputs}
            read |= dict.fromkeys(graph.outputs)
    return [value for value in read if value not in made]


def _walk(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Yield nodes and those of the graphs within them."""
    for node in nodes:
        yield node
        for graph in inner_graphs(node):
            yield from _walk(graph)


def _is_constant(value: ir.Value) -> bool:
    return editing.producer(value, "Constant") is not None


def _belongs(value: ir.Value, prefix: str) -> bool:
    return value.name is not None and value.name.startswith(prefix)
