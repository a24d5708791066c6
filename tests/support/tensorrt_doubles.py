"""Doubles for TensorRT sessions: an engine that is onnxruntime, a GPU that is memory.

The doubles have no method the real bindings lack (test_runtime_tensorrt.py checks it), and the
engine's double reads and writes by address as an engine does, so what is tested is which
addresses, shapes, profiles, copies and recordings the session chooses.
"""

from __future__ import annotations

import ctypes
import enum
import math
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort

from lminf_export.bundle.files import file_sha256
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.records import Engine, Plugin
from lminf_export.bundle.writer import BundleWriter
from lminf_export.engine.common import profiles
from lminf_export.export.engine_graph import write_engine_graph
from lminf_export.operator import bindings
from lminf_export.runtime import tensorrt as runtime
from lminf_export.runtime.engine import Libraries
from lminf_export.runtime.gpu import Gpu
from lminf_export.runtime.tensorrt import TensorRTSession
from lminf_export.tensors.dtypes import ELEMENT_TYPES
from tests.support.engine_graphs import request_of
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(sliding_window=5)
VERSION = "1.7.1.116"
ADA = Gpu("a card", (8, 9))


def bundle_with_plan(
    folder,
    tiny=TINY,
    *,
    target="sm_80+",
    version=VERSION,
    max_batch_size=3,
    plugin=None,
    content=b"a library",
    **options,
):
    """A bundle whose plan is a few bytes, and the graph its double will run.

    plugin: None for an engine of standard operators, "beside" or "embedded" for one with it.
    content: of the plugin's file.
    options: of the builder, as the manifest records them.
    """
    plain = tiny.write(folder / "plain")
    graph = plain.graph_path if plugin else plain.path / "ready.onnx"
    request = request_of(
        tiny,
        plain.path,
        onnx_path=graph,
        max_batch_size=max_batch_size,
        with_plugin=plugin is not None,
    )
    if plugin is None:
        write_engine_graph(plain.graph_path, request)
    library = folder / "liblminf_tensorrt.so"
    library.write_bytes(content)
    engine = Engine(
        builder="tensorrt" if plugin else "tensorrt-rtx",
        version=version,
        target=target,
        file="engine.plan",
        dtype=tiny.dtype,
        profiles=profiles(request),
        plugin=Plugin(file=library.name, sha256=file_sha256(library), embedded=plugin == "embedded")
        if plugin
        else None,
        ring_writes="circular" if plugin else "linear",
        sinks_in_place=plugin is not None,
        options=options,
    )
    with BundleWriter(folder / "bundle") as writer:
        for name, role in (("model.onnx", "graph"), ("model.onnx.data", "weights")):
            writer.add(name, role).write_bytes((plain.path / name).read_bytes())
        writer.add("engine.plan", "plan").write_bytes(b"a plan")
        if plugin:
            writer.add(library.name, "plugin").write_bytes(library.read_bytes())
        writer.commit(tiny.manifest(engine))
    return Bundle.open(folder / "bundle"), graph


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class DataType(enum.Enum):
    INT64, FLOAT, HALF, BF16, INT8 = range(5)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ILogger:
    Severity = Severity


class IPluginRegistry:
    """Has the plugin once its library is loaded."""

    def __init__(self, log, loads=True):
        self._log, self._loads, self._loaded = log, loads, []

    def load_library(self, plugin_path):
        if not self._loads:
            self._log(Severity.ERROR, "not an ELF file\nsomewhere")
            return None
        self._loaded.append(plugin_path)
        return object()

    def get_creator(self, type, version, plugin_namespace):
        wanted = ("LambdaAttention", "1", "lminf")
        return object() if self._loaded and (type, version, plugin_namespace) == wanted else None


class IExecutionContext:
    """Runs the prepared graph over whatever stands at the addresses it was told."""

    def __init__(self, engine, strategy):
        self._engine = engine
        self._needs_memory = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._shapes, self._addresses = {}, {}
        self._profile = None

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle == Cudart.STREAM
        self._profile = profile_index
        return profile_index < len(self._engine._profiles)

    def set_device_memory(self, memory, size):
        assert size >= self._engine.device_memory_size_v2
        assert Cudart.room(memory) >= size
        assert memory % 256 == 0
        self._needs_memory = False

    def set_input_shape(self, name, shape):
        self._shapes[name] = tuple(shape)
        spec = next(s for s in self._engine._inputs if s.name == name)
        table = self._engine._profiles[self._profile]
        return all(
            table[dim][0] <= size <= table[dim][2] if dim in table else True
            for dim, size in zip(spec.shape, shape, strict=True)
        )

    def set_tensor_address(self, name, memory):
        assert memory % 256 == 0, f"{name} is not aligned"
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        engine = self._engine
        if engine._failures:
            engine._log(Severity.ERROR, engine._failures.pop())
            return False
        assert not self._needs_memory
        for past in (s.name for s in engine._inputs if s.name.startswith("past_key_values")):
            present = past.replace("past_key_values", "present")
            in_place = past.rpartition(".")[2] not in SINKS or engine._sinks_in_place
            assert (self._addresses[past] == self._addresses[present]) == in_place
        engine._enqueued(self._addresses)
        # What was told last holds when the work is done, as in a recording.
        return engine._cudart.enqueue(self._work_of(dict(self._shapes), dict(self._addresses)))

    def _work_of(self, shapes, addresses):
        def work():
            self._shapes, self._addresses = shapes, addresses
            self._run()

        return work

    def _run(self):
        engine = self._engine
        engine._runs.append((self._profile, self._shapes[bindings.INPUT_IDS]))
        feed = {s.name: self._array(s.name, self._shapes[s.name], s.dtype) for s in engine._inputs}
        # Copies, since outputs may land on inputs.
        results = engine._session.run(None, {name: x.copy() for name, x in feed.items()})
        for spec, result in zip(engine._outputs, results, strict=True):
            self._array(spec.name, result.shape, spec.dtype)[...] = result

    def _array(self, name, shape, dtype):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        assert Cudart.room(self._addresses[name]) >= size, f"{name} is too small"
        raw = (ctypes.c_byte * size).from_address(self._addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)


SINKS = bindings.SINK_KINDS


class ICudaEngine:
    def __init__(self, manifest, graph, log, cudart):
        self._cudart = cudart
        self._sinks_in_place = manifest.engine.sinks_in_place
        self._plugin = manifest.engine.plugin
        self._inputs, self._outputs = manifest.inputs, manifest.outputs
        self._profiles = manifest.engine.profiles
        self._rings = manifest.contract.ring_sizes()
        self._aliases = manifest.contract.ring_updates()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self._session = ort.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        self._log, self._failures, self._runs = log, [], []
        # Called with the addresses of every step, as a plugin is.
        self._enqueued = lambda addresses: None

    @property
    def num_io_tensors(self):
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index):
        return (*self._inputs, *self._outputs)[index].name

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if self._spec(name) in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[ELEMENT_TYPES[self._spec(name).dtype].tensorrt]

    def get_tensor_shape(self, name):
        shape = self._spec(name).shape
        return tuple(self._rings.get(d, -1) if isinstance(d, str) else d for d in shape)

    def get_aliased_input_tensor(self, name):
        if self._plugin:
            return None  # what a plugin aliases is its own business
        return {present: past for past, present in self._aliases.items()}.get(name)

    @property
    def device_memory_size_v2(self):
        return 999

    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        return IExecutionContext(self, strategy)

    def _spec(self, name):
        return next(s for s in (*self._inputs, *self._outputs) if s.name == name)


class Cudart:
    """Memory of this machine in the place of a GPU's, and a stream that works at once."""

    STREAM = 77
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    sizes: dict = {}  # noqa: RUF012  # the driver's own table, one for all

    class cudaError_t(enum.Enum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2
        cudaErrorStreamCaptureInvalidated = 901

    class cudaMemcpyKind(enum.Enum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2
        cudaMemcpyDeviceToDevice = 3

    class cudaStreamCaptureMode(enum.Enum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, capacity=2**30):
        self._capacity, self._held, self._pinned = capacity, {}, {}
        self._recording, self._recordable, self._graphs, self._launches = None, True, {}, 0

    @classmethod
    def room(cls, address):
        """Bytes from an address to the end of the block it lies in."""
        return max(
            (
                start + size - address
                for start, size in cls.sizes.copy().items()
                if start <= address
            ),
            default=-1,
            key=lambda left: left if left >= 0 else -math.inf,
        )

    def enqueue(self, work):
        """Do a piece of work, or record it."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)
        return True

    def cudaStreamCreateWithFlags(self, flags):
        return self.cudaError_t.cudaSuccess, self.STREAM

    def cudaStreamDestroy(self, stream):
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        assert self._recording is None, "a recording cannot wait"
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self._recording is None
        self._recording = []
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        recorded, self._recording = self._recording, None
        if not self._recordable:
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        graph = object()
        self._graphs[id(graph)] = recorded
        self._held_graphs = [*getattr(self, "_held_graphs", []), graph]
        return self.cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph, flags):
        executable = object()
        self._graphs[id(executable)] = self._graphs[id(graph)]
        self._held_graphs.append(executable)
        return self.cudaError_t.cudaSuccess, executable

    def cudaGraphLaunch(self, executable, stream):
        self._launches += 1
        for work in self._graphs[id(executable)]:
            work()
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph):
        del self._graphs[id(graph)]
        return (self.cudaError_t.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable):
        del self._graphs[id(executable)]
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemGetInfo(self):
        return self.cudaError_t.cudaSuccess, self._capacity, self._capacity

    def cudaMalloc(self, size):
        if size > self._capacity:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        address = self._allocate(self._held, size)
        self.sizes[address] = size
        return self.cudaError_t.cudaSuccess, address

    def cudaFree(self, address):
        # Memory goes last: another thread may be given its address at once.
        del self.sizes[address], self._held[address]
        return (self.cudaError_t.cudaSuccess,)

    def cudaHostAlloc(self, size, flags):
        return self.cudaError_t.cudaSuccess, self._allocate(self._pinned, size)

    def cudaFreeHost(self, address):
        del self._pinned[address]
        return (self.cudaError_t.cudaSuccess,)

    def _allocate(self, held, size):
        # Not zeros: a session that relies on fresh memory must be caught.
        memory = np.full(size + 256, 0x7F, np.uint8)
        address = -(-memory.ctypes.data // 256) * 256
        held[address] = memory
        return address

    def cudaMemsetAsync(self, address, value, count, stream):
        assert count <= self.room(address)
        self.enqueue(lambda: ctypes.memset(address, value, count))
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        for address in self._on_device(dst, src, kind):
            assert count <= self.room(address)
        self.enqueue(lambda: ctypes.memmove(dst, src, count))
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemcpy2DAsync(self, dst, dpitch, src, spitch, width, height, kind, stream):
        assert width <= min(dpitch, spitch)
        for address in self._on_device(dst, src, kind):
            pitch = dpitch if address == dst else spitch
            assert pitch * (height - 1) + width <= self.room(address)

        def work():
            for row in range(height):
                ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

        self.enqueue(work)
        return (self.cudaError_t.cudaSuccess,)

    def _on_device(self, dst, src, kind):
        kinds = self.cudaMemcpyKind
        return {
            kinds.cudaMemcpyHostToDevice: [dst],
            kinds.cudaMemcpyDeviceToHost: [src],
            kinds.cudaMemcpyDeviceToDevice: [dst, src],
        }[kind]


class Setup:
    """A session on doubles, and the doubles."""

    def __init__(self, folder, monkeypatch, gpu=ADA, capacity=2**30, tiny=TINY, **changes):
        monkeypatch.setattr(runtime, "find_gpu", lambda: gpu)
        self.bundle, graph = bundle_with_plan(folder, tiny, **changes)
        self.cudart = Cudart(capacity)
        self.engine, self.registry, self.plugin_loads = None, None, True
        setup = self

        class Runtime:
            def __init__(self, logger):
                self._logger = logger
                self.engine_host_code_allowed = False
                setup.registry = IPluginRegistry(logger.log, setup.plugin_loads)

            def get_plugin_registry(self):
                return setup.registry

            def deserialize_cuda_engine(self, serialized_engine):
                assert bytes(serialized_engine) == b"a plan"
                plugin = setup.bundle.manifest.engine.plugin
                if plugin and plugin.embedded:
                    assert self.engine_host_code_allowed
                elif plugin:
                    assert setup.registry._loaded, "the plan is read before its plugin"
                setup.engine = ICudaEngine(
                    setup.bundle.manifest, graph, self._logger.log, setup.cudart
                )
                return setup.engine

        self.trt = SimpleNamespace(
            __version__=VERSION,
            ILogger=ILogger,
            TensorIOMode=TensorIOMode,
            Runtime=Runtime,
            ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        )

    def open(self, **settings):
        libraries = Libraries(self.trt, self.cudart)
        return TensorRTSession(self.bundle, libraries=libraries, **settings)
