"""Shared by all engine builders: the request, its profiles and sizes, the facts of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lminf_export.engine.options import EngineOptions
from lminf_export.errors import EngineError
from lminf_export.operator import bindings
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import as_integer

LOGGER_NAME = "lminf_export.engine.builders"

# Symbol → (minimum, optimum, maximum) of one optimisation profile.
Profile = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class EngineRequest:
    """An engine to build.

    Attributes:
        onnx_path: the graph to build from, as `export.engine_graph` writes it; its weights lie
            in the same folder.
        plan_path: the plan to write; its folder exists.
        contract: the exported graph's inputs and outputs.
        chunk_size: largest S, new tokens in one step.
        max_batch_size: largest B, streams side by side.
        with_plugin: the plugin runs the attention; otherwise standard operators do.
        plugin_path: the plugin's library, needed where the engine is built.
        options: the user's settings for the builder.
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
    def ring_names(self) -> tuple[str, ...]:
        """Names of every ring among inputs and outputs."""
        return tuple(name for pair in self.contract.ring_updates().items() for name in pair)

    @property
    def updated_in_place(self) -> dict[str, str]:
        """Past name → present name of every cache the engine must update in place."""
        # The function body reads old sinks, and nothing promises that it does so in time.
        sinks = self.contract.sink_updates() if self.with_plugin else {}
        return self.contract.ring_updates() | sinks


@dataclass(frozen=True)
class EngineFacts:
    """Facts of a plan that was built.

    Attributes:
        builder: "tensorrt" or "tensorrt-rtx".
        version: of the builder, as it says itself; a plan runs on this version only.
        target: GPUs the plan is for: "sm_89" for one, "sm_80+" from one on.
        dtype: element type of weights and caches.
        profiles: the optimisation profiles, in the engine's order.
        cache_updates: caches the engine is to write in place.
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
        # A profile of exactly one row makes TensorRT for RTX store a second layout of the weights:
        # 617 MB of weights became a plan of 957 MB, and of 638 MB where two rows are allowed.
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
