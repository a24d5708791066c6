"""Prepared graph → plan, through the Python API that TensorRT and TensorRT for RTX share.

The API's module is passed in as `trt`. Releases number their enumerations differently and
drop members, so every member is looked up by name.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from lminf_export.engine import settings
from lminf_export.engine.common import LOGGER_NAME, EngineRequest, Profile, input_ranges, profiles
from lminf_export.engine.plugin_node import cache_updates
from lminf_export.errors import EngineError
from lminf_export.operator import contract
from lminf_export.progress import Progress
from lminf_export.runtime.engine import PLUGIN_PREFIX, load_plugin, message_log
from lminf_export.tensors.dtypes import ELEMENT_TYPES

logger = logging.getLogger(LOGGER_NAME)

# Lines of messages that only repeat the node's name, or that there is no GPU to ask.
_NOISE = ("Invalid Node - ", "catchCudaError")
_NO_REASON = "no reason given; -v shows its messages"
# Phases below this depth last milliseconds each and come by the thousand.
_SHOWN_DEPTH = 2


def compile_plan(trt: Any, request: EngineRequest, plan: Path, progress: Progress) -> Any:
    """Parse a prepared graph, build it and write the plan.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        request: what to build.
        plan: the file to write.
        progress: receives the phase that runs.

    Returns:
        The IBuilderConfig the plan was built with.

    Raises:
        EngineError: naming what the parser or the builder refused.
    """
    _require_features(trt, request)
    messages = message_log(trt, logger)
    builder = trt.Builder(messages)
    if request.with_plugin:
        assert request.plugin_path is not None, "nothing is built without the library"
        load_plugin(builder.get_plugin_registry(), request.plugin_path, messages.errors)
    network = builder.create_network(_creation_flags(trt))
    progress("parsing the graph", None)
    # The parser maps the weights into memory, and the network points there: keep it.
    parser = trt.OnnxParser(network, messages)
    if not parser.parse_from_file(str(request.onnx_path)):
        raise EngineError(parser_message(parser, messages.errors))
    check_network(trt, network, request)
    config = builder.create_builder_config()
    _stay_in_full_precision(trt, config)
    settings.apply(trt, config, request)
    timing_cache = settings.open_timing_cache(config, request.options, messages.errors)
    for ranges in profiles(request):
        config.add_optimization_profile(_profile(builder, request, ranges))
    monitor = _progress_monitor(trt, progress)
    config.progress_monitor = monitor
    progress("building the engine", None)
    _write_plan(trt, builder, network, config, plan, messages.errors)
    settings.save_timing_cache(timing_cache, request.options)
    return config


def _require_features(trt: Any, request: EngineRequest) -> None:
    """Refuse releases that cannot update a cache in place: a plugin's, or one from a graph."""
    if request.with_plugin:
        settings.require_aliases(trt)
    elif not hasattr(trt, "IKVCacheUpdateLayer"):
        raise EngineError(
            f"{trt.__name__} {trt.__version__} has no cache updates in place; "
            "TensorRT 10.15 or TensorRT for RTX 1.3 or later is required, or the plugin, which "
            "needs none of them"
        )


def _creation_flags(trt: Any) -> int:
    """The types of the graph are the types of the engine, where that is still a choice."""
    flag = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    return 0 if flag is None else 1 << int(flag)


def _stay_in_full_precision(trt: Any, config: Any) -> None:
    """TF32 would round the factors of float32 products to ten bits; it is on by default."""
    flag = trt.BuilderFlag.__members__.get("TF32")
    if flag is not None:
        config.clear_flag(flag)


def parser_message(parser: Any, errors: Iterable[str] = ()) -> str:
    """Return the parser's first complaint as one sentence that names the node.

    Args:
        parser: an OnnxParser that has refused a graph.
        errors: what the library logged, used where the parser keeps no error of its own.
    """
    count = parser.num_errors
    if not count:
        return f"the parser refuses the graph: {_reason(errors)}"
    error = parser.get_error(0)
    # A node inside a function is identified by the names of the calls around it.
    place = [*error.local_function_stack(), error.node_name()]
    where = " / ".join(name for name in place if name) or f"number {error.node()}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    operator = f" ({error.node_operator()})" if error.node_operator() else ""
    # A plugin logs why it refuses a node; the parser only reports that it did.
    reasons = [*(text for text in errors if text.startswith(PLUGIN_PREFIX)), error.desc()]
    return f"the parser refuses node {where}{operator}: {_reason(reasons)}{more}"


def check_network(trt: Any, network: Any, request: EngineRequest) -> None:
    """Check that the parsed network has the contract's borders and updates its caches in place.

    With a plugin every layer must have become one layer of the plugin, sinks included.

    Raises:
        EngineError: naming the first tensor that differs, or the caches that would be copied.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    wanted = request.contract.inputs()
    if [tensor.name for tensor in inputs] != [spec.name for spec in wanted]:
        raise EngineError("the parsed network has other inputs than the exported graph")
    for tensor, spec in zip(inputs, wanted, strict=True):
        if tensor.dtype != trt.DataType.__members__[ELEMENT_TYPES[spec.dtype].tensorrt]:
            raise EngineError(f"the parsed network has {tensor.name} as {tensor.dtype}")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    updates = _plugin_updates if request.with_plugin else _kernel_updates
    missing = request.updated_in_place.items() - updates(trt, layers, request).items()
    if missing:
        raise EngineError(
            f"{len(missing)} of {len(request.updated_in_place)} caches would not be updated in "
            f"place, {min(missing)[0]} among them"
        )


def _kernel_updates(trt: Any, layers: list[Any], request: EngineRequest) -> dict[str, str]:
    """Past name → present name of TensorRT's own cache updates."""
    return {
        layer.get_input(0).name: layer.get_output(0).name
        for layer in layers
        if layer.type == trt.LayerType.KV_CACHE_UPDATE
    }


def _plugin_updates(trt: Any, layers: list[Any], request: EngineRequest) -> dict[str, str]:
    """Past name → present name of the plugin's caches; there must be a plugin for every layer."""
    plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    count = len(contract.inputs(int8_cache=request.contract.int8_cache))
    ours = [layer for layer in plugins if layer.num_inputs == count]
    if len(ours) != len(request.contract.layers):
        raise EngineError(
            f"the parsed network has {len(ours)} layers of the LambdaAttention plugin, the model "
            f"has {len(request.contract.layers)}"
        )
    found: dict[str, str] = {}
    for layer in ours:
        inputs = [layer.get_input(index).name for index in range(layer.num_inputs)]
        outputs = [layer.get_output(index).name for index in range(layer.num_outputs)]
        found |= cache_updates(inputs, outputs)
    return found


def _profile(builder: Any, request: EngineRequest, ranges: Profile) -> Any:
    """Set the smallest, usual and largest shape of every input with open dimensions."""
    profile = builder.create_optimization_profile()
    for name, shapes in input_ranges(request, ranges).items():
        profile.set_shape(name, *shapes)
    return profile


def _write_plan(
    trt: Any, builder: Any, network: Any, config: Any, plan: Path, errors: list[str]
) -> None:
    with open(plan, "wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = _stream_writer(trt, file)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.error is not None:
                raise writer.error
        else:
            serialized = builder.build_serialized_network(network, config)
            built = serialized is not None
            if built:
                file.write(memoryview(serialized))
        file.flush()
    if not built:
        raise EngineError(f"the builder refuses the network: {_reason(errors)}")


def _stream_writer(trt: Any, file: BinaryIO) -> Any:
    """Return an IStreamWriter: the plan is written in blocks and is never in memory as a whole."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            # An exception must not travel through the library.
            if self.error is None:
                try:
                    return file.write(data)
                except OSError as error:
                    self.error = error
            return 0

    return Writer()


def _progress_monitor(trt: Any, progress: Progress) -> Any:
    """Return an IProgressMonitor that tells how far the outer phases are."""
    phases = PhaseTree()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            if phases.start(name, parent, num_steps):
                progress(_phase_text(name), 0.0)

        def step_complete(self, name: str, step: int) -> bool:
            fraction = phases.step(name, step)
            if fraction is not None:
                progress(_phase_text(name), fraction)
            return True

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

    return Monitor()


def _phase_text(name: str) -> str:
    return f"building the engine: {name.lower()}"


class PhaseTree:
    """The phases a builder reports, from several threads at once; only the outer ones count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[int, int, int]] = {}

    def start(self, name: str, parent: str | None, num_steps: int) -> bool:
        """Enter a phase; returns whether to show it."""
        with self._lock:
            depth = self._open[parent][0] + 1 if parent in self._open else 0
            self._open[name] = (depth, num_steps, 0)
            return depth <= _SHOWN_DEPTH

    def step(self, name: str, step: int) -> float | None:
        """Count a step; returns the phase's fraction when it is worth telling."""
        with self._lock:
            depth, num_steps, percent = self._open.get(name, (_SHOWN_DEPTH + 1, 0, 0))
            if depth > _SHOWN_DEPTH or num_steps < 1:
                return None
            now = min(100 * (step + 1) // num_steps, 100)
            if now == percent:
                return None
            self._open[name] = (depth, num_steps, now)
            return now / 100

    def finish(self, name: str) -> None:
        """Leave a phase."""
        with self._lock:
            self._open.pop(name, None)


def _reason(messages: Iterable[str]) -> str:
    """Return the first line that gives a reason."""
    lines = (line.strip() for message in messages for line in message.splitlines())
    return next((x for x in lines if x and not any(noise in x for noise in _NOISE)), _NO_REASON)
