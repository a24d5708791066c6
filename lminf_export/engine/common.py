"""What every engine builder shares: the request, the facts, the graph an engine's parser takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as ir_passes

from lminf_export.engine.options import EngineOptions
from lminf_export.errors import EngineError
from lminf_export.operator import bindings
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import as_integer

LOGGER_NAME = "lminf_export.engine.builders"

# Symbol → (minimum, optimum, maximum) of one optimisation profile.
Profile = dict[str, tuple[int, int, int]]

_WRITE_OP = "TensorScatter"


@dataclass(frozen=True)
class EngineRequest:
    """What to build.

    Attributes:
        onnx_path: the exported graph, or for "tensorrt" the one `write_recipe` makes of it; its
            weights lie in the same folder.
        plan_path: the plan to write; its folder exists.
        contract: the exported graph's inputs and outputs.
        chunk_size: largest S, new tokens in one step.
        max_batch_size: largest B, streams side by side.
        with_plugin: the plugin runs the attention; otherwise standard operators do.
        plugin_path: the plugin's library, needed where the engine is built.
        options: what the user asked of the builder.
    """

    onnx_path: Path
    plan_path: Path
    contract: GraphContract
    chunk_size: int
    max_batch_size: int = 1
    with_plugin: bool = False
    plugin_path: Path | None = None
    options: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        for name in ("chunk_size", "max_batch_size"):
            number = as_integer(name, getattr(self, name), 1, EngineError)
            object.__setattr__(self, name, number)

    @property
    def updated_in_place(self) -> dict[str, str]:
        """Past name → present name of every cache the engine must update in place."""
        # The function body reads old sinks, and nothing promises that it does so in time.
        sinks = self.contract.sink_updates() if self.with_plugin else {}
        return self.contract.ring_updates() | sinks


@dataclass(frozen=True)
class EngineFacts:
    """What was built.

    Attributes:
        builder: "tensorrt" or "tensorrt-rtx".
        version: of the builder, as it says itself; a plan runs on this version only.
        target: GPUs the plan is for: "sm_89" for one, "sm_80+" from one on.
        dtype: element type of weights and caches.
        profiles: the optimisation profiles, in the engine's order.
        cache_updates: caches the engine writes in place.
        seconds: wall time of the build.
        bytes: size of the plan.
    """

    builder: str
    version: str
    target: str
    dtype: str
    profiles: tuple[Profile, ...]
    cache_updates: int
    seconds: float
    bytes: int


def profiles(request: EngineRequest) -> tuple[Profile, ...]:
    """Return the ranges of the symbolic dimensions, profile by profile.

    The first is for single tokens, the second for chunks of any size up to the largest.
    Ring dimensions are not among them: an engine's rings are always full-sized.
    """
    largest = request.max_batch_size
    batch = (1, largest, largest)
    single: Profile = {
        bindings.BATCH: batch,
        bindings.SEQUENCE: (1, 1, 1),
        bindings.NUM_LOGITS: (1, 1, 1),
    }
    if request.chunk_size == 1:
        return (single,)
    if not request.with_plugin:
        # A profile of exactly one row makes TensorRT for RTX lay weights out once more, just for
        # it: 617 MB of weights became a plan of 957 MB, and of 638 MB where two rows are allowed.
        single[bindings.BATCH] = (1, largest, max(largest, 2))
    # Generation wants logits of the last token only, evaluation those of the whole chunk.
    chunk: Profile = {
        bindings.BATCH: batch,
        bindings.SEQUENCE: (1, request.chunk_size, request.chunk_size),
        bindings.NUM_LOGITS: (1, 1, request.chunk_size),
    }
    return single, chunk


def fixed_sizes(request: EngineRequest) -> dict[str, int]:
    """Return the symbolic dimensions that have one size in an engine, and that size.

    Rings always; with the plugin also what all profiles agree on, such as a batch of one.
    """
    fixed = request.contract.ring_sizes()
    if not request.with_plugin:
        return fixed
    ranges = profiles(request)
    for symbol in ranges[0]:
        sizes = {size for profile in ranges for size in profile[symbol]}
        if len(sizes) == 1:
            fixed[symbol] = sizes.pop()
    return fixed


def input_ranges(
    request: EngineRequest, ranges: Profile
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return the smallest, usual and largest shape in one profile of every input of open shape."""
    fixed = fixed_sizes(request)
    table = {**ranges, **{symbol: (size, size, size) for symbol, size in fixed.items()}}
    found = {}
    for spec in request.contract.inputs():
        if all(isinstance(dim, int) or dim in fixed for dim in spec.shape):
            continue
        low, usual, high = (
            tuple(table[dim][which] if isinstance(dim, str) else dim for dim in spec.shape)
            for which in range(3)
        )
        found[spec.name] = (low, usual, high)
    return found


def prepare_for_engine(onnx_path: Path, out_path: Path, request: EngineRequest) -> None:
    """Write the graph in the form an engine's parser takes; the weights stay where they are.

    The operator's function body is inlined, so that what all layers share exists once. Rings
    are written linearly: TensorRT's KV cache update knows no circular mode, and the runtime
    never lets a chunk cross the ring's end. Ring dimensions become numbers, which the update
    requires. Every node is named after its first output, so that messages mean something.

    Requires: the graph is one of `graph.write_graph`.
    Ensures: the same values for every step that does not cross a ring's end.

    Args:
        onnx_path: the exported graph.
        out_path: where to write; in the same folder, since weights are found relative to it.
        request: whose layers give the ring capacities.

    Raises:
        EngineError: the graph cannot be read or written, or is not one of ours.
    """
    assert out_path.parent.resolve() == onnx_path.parent.resolve(), "weights would be lost"
    model = load_graph(onnx_path)
    ir_passes.InlinePass()(model)
    _write_linearly(model, onnx_path, request)
    freeze_sizes(model, onnx_path, request)
    save_graph(model, out_path)


def save_graph(model: ir.Model, path: Path) -> None:
    """Tidy a graph, name every node after its first output, and write it."""
    for step in (
        ir_passes.IdentityEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.RemoveUnusedOpsetsPass(),
    ):
        step(model)
    for node in model.graph:
        node.name = node.outputs[0].name
    try:
        ir.save(model, path)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}") from error


def load_graph(path: Path) -> ir.Model:
    """Read a graph, its weights left where they are."""
    try:
        return ir.load(path)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise EngineError(f"{path} is not an ONNX model: {error}") from error


def _write_linearly(model: ir.Model, path: Path, request: EngineRequest) -> None:
    writes = {}
    for node in model.graph:
        if node.op_type != _WRITE_OP or node.domain:
            continue
        past, present = node.inputs[0], node.outputs[0]
        if past is not None and past.is_graph_input() and present.is_graph_output():
            writes[past.name] = present.name
        node.attributes["mode"] = ir.AttrString("mode", "linear")
    updates = request.contract.ring_updates()
    if writes != updates:
        raise EngineError(
            f"{path}: the graph writes {len(writes)} rings from input to output, its layers "
            f"have {len(updates)}; export the model again"
        )


def freeze_sizes(model: ir.Model, path: Path, request: EngineRequest) -> None:
    """Make every symbolic dimension that has one size in an engine a number."""
    sizes = fixed_sizes(request)
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for name in (x for pair in request.contract.ring_updates().items() for x in pair):
        shape = values[name].shape
        if shape is None or len(shape) != 4:
            raise EngineError(f"{path}: {name} has no shape of rank 4; export the model again")
    for value in values.values():
        if value.shape is not None:
            value.shape = ir.Shape(_number(dim, sizes) for dim in value.shape)


def _number(dim: int | ir.SymbolicDim, sizes: dict[str, int]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return sizes.get(dim.value, dim.value) if dim.value is not None else None
