"""A bundle's plan in TensorRT or TensorRT for RTX, on an NVIDIA GPU.

Not yet executed on a GPU. Its use of both libraries is tested against their real Python
surfaces and with recording doubles; the numbers it yields are not checked here.

Rings are updated in place: past and present are one address, as the engine's cache updates
require. Sinks go from one buffer to another and change places after each step, since nothing
promises that the engine reads a sink before it writes it.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lminf_export import bindings
from lminf_export.bundle import Bundle
from lminf_export.errors import SessionError
from lminf_export.manifest import Engine, Manifest, Tensor, describe, human_bytes
from lminf_export.runtime.cache import State, ring_capacities
from lminf_export.runtime.gpu import Buffers, Cuda, Gpu, find_gpu

logger = logging.getLogger(__name__)

# builder → Python package of its runtime.
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_DTYPES = {"INT64": "int64", "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_INSTEAD = "run the bundle's model.onnx with onnxruntime instead"


@dataclass(frozen=True)
class Libraries:
    """What a session runs on; tests bring doubles.

    Attributes:
        trt: `tensorrt` or `tensorrt_rtx`.
        cudart: `cuda.bindings.runtime`.
    """

    trt: Any
    cudart: Any


class TensorRTSession:
    """One engine, many states; see `lminf_export.runtime.session.Session`.

    Args:
        bundle: opened and checked; its plan matches the manifest's SHA-256. A plan is
            executable code: nothing else is ever deserialised.
        libraries: what to run on; by default what the manifest's builder needs.

    Raises:
        SessionError: no plan, no GPU, another GPU or another version than the plan is for, a
            missing Python package, or an engine whose tensors are not those of the manifest.
    """

    def __init__(self, bundle: Bundle, *, libraries: Libraries | None = None) -> None:
        self.manifest = bundle.manifest
        path, engine = bundle.plan_path, bundle.manifest.engine
        if path is None or engine is None:
            raise SessionError(f"{bundle.path} holds no plan; {_INSTEAD}")
        # Asked of the driver first: TensorRT itself crashes where there is none.
        gpu = find_gpu()
        if isinstance(gpu, str):
            raise SessionError(
                f"this plan needs an NVIDIA GPU; none was found on this machine ({gpu}); {_INSTEAD}"
            )
        _check_target(engine, gpu)
        libraries = libraries or _load_libraries(engine)
        _check_version(engine, libraries.trt)
        self._cuda = Cuda(libraries.cudart)
        self._messages = message_log(libraries.trt, logger)
        self._runtime = libraries.trt.Runtime(self._messages)
        self._engine = _deserialize(self._runtime, path, self._messages)
        _check_table(libraries.trt, self._engine, self.manifest, path)
        _check_aliases(self._engine, self.manifest, path)
        # One context for each profile: changing a context's profile would cost a synchronisation.
        self._contexts = [self._context(index) for index in range(len(engine.profiles))]
        self._cuda.synchronize()
        self.max_batch_size = min(profile[bindings.BATCH][2] for profile in engine.profiles)

    @property
    def attention(self) -> str:
        """What computes the attention, for people."""
        return "the engine"

    @property
    def caches_in_main_memory(self) -> bool:
        """Whether states take this machine's main memory."""
        return False

    def new_state(self, batch_size: int) -> TensorRTState:
        """Return the state of B streams that have seen nothing."""
        if batch_size > self.max_batch_size:
            raise SessionError(
                f"batch_size={batch_size}: this plan takes at most {self.max_batch_size}; "
                "build it with a larger --max-batch-size"
            )
        return TensorRTState(self._cuda, self.manifest, batch_size)

    def owns(self, state: State) -> bool:
        """Say whether a state was made by this session."""
        return isinstance(state, TensorRTState) and state.cuda is self._cuda

    def step_limit(self, state: State) -> int:
        """Return the largest S that crosses no ring's end in any row."""
        room = (
            capacity - int(past) % capacity
            for capacity in state.capacities
            for past in state.past_length
        )
        return min(self.manifest.lambda_config.chunk_size, *room)

    def step(
        self,
        state: State,
        input_ids: np.ndarray,
        new_length: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        """Run S tokens of every stream: see `Session.step`."""
        assert isinstance(state, TensorRTState)
        assert input_ids.shape[1] <= self.step_limit(state), "a linear write would leave the ring"
        wanted = logits_index.shape[1]
        if not wanted:
            # An engine's profile starts at one row.
            logits_index = np.zeros((state.batch_size, 1), np.int64)
        state.load(input_ids, new_length, logits_index)
        # The first profile is for single tokens, the last takes everything.
        single = input_ids.shape[1] == 1 and logits_index.shape[1] == 1
        context = self._contexts[0 if single else -1]
        self._bind(context, state)
        self._messages.errors.clear()
        if not context.execute_async_v3(self._cuda.stream):
            raise SessionError(
                f"the step at token {state.furthest} failed: {_reason(self._messages.errors)}"
            )
        return state.finish()[:, :wanted]

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise SessionError(
                "the engine's working memory cannot be allocated: "
                f"{_reason(self._messages.errors)}; {_INSTEAD}"
            )
        if not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise SessionError(f"the engine has no profile {profile}; build it again")
        return context

    def _bind(self, context: Any, state: TensorRTState) -> None:
        for name, (address, shape) in state.inputs().items():
            if not context.set_input_shape(name, shape):
                raise SessionError(
                    f"the engine refuses {name} of shape {shape}: {_reason(self._messages.errors)}"
                )
            context.set_tensor_address(name, address)
        for name, address in state.outputs().items():
            context.set_tensor_address(name, address)


class TensorRTState(State):
    """Caches in the GPU's memory, full-sized from the start; freed with this object."""

    def __init__(self, cuda: Cuda, manifest: Manifest, batch_size: int) -> None:
        full = ring_capacities(manifest.layer_specs)
        super().__init__(
            manifest.layer_specs, batch_size, manifest.item_size, {size: size for size in full}
        )
        self.cuda = cuda
        self._vocab_size = manifest.vocab_size
        self._require_memory()
        self._buffers = Buffers(cuda)
        weakref.finalize(self, self._buffers.free)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._past: dict[str, int] = {}
        self._present: dict[str, int] = {}
        for past, present in zip(
            bindings.cache_specs(self.layers, manifest.dtype, present=False),
            bindings.cache_specs(self.layers, manifest.dtype, present=True),
            strict=True,
        ):
            self._add_cache(past, present.name)
        self._small: dict[str, np.ndarray] = {}
        self._logits = np.zeros((0,), np.float32)

    def load(self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray) -> None:
        """Send what changes at every step to the GPU.

        The arrays are kept until the step ends, since copies may still read them.
        """
        self._small = {
            bindings.INPUT_IDS: np.ascontiguousarray(input_ids, np.int64),
            bindings.PAST_LENGTH: self.past_length,
            bindings.NEW_LENGTH: np.ascontiguousarray(new_length, np.int64),
            bindings.LOGITS_INDEX: np.ascontiguousarray(logits_index, np.int64),
        }
        for name, array in self._small.items():
            self.cuda.send(self._buffers.reserve(name, array.nbytes), array)
        self._logits = np.empty((*logits_index.shape, self._vocab_size), np.float32)
        self._buffers.reserve(bindings.LOGITS, self._logits.nbytes)

    def inputs(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return the address and shape of every input of the step loaded last."""
        small = {name: (self._buffers[name], array.shape) for name, array in self._small.items()}
        caches = {name: (address, self._shapes[name]) for name, address in self._past.items()}
        return {**small, **caches}

    def outputs(self) -> dict[str, int]:
        """Return the address of every output."""
        return {bindings.LOGITS: self._buffers[bindings.LOGITS], **self._present}

    def finish(self) -> np.ndarray:
        """Wait for the step, let the sinks change places, and return the logits (B, K, V)."""
        self.cuda.receive(self._logits, self._buffers[bindings.LOGITS])
        self.cuda.synchronize()
        for past, present in zip(self._past, self._present, strict=True):
            self._past[past], self._present[present] = self._present[present], self._past[past]
        return self._logits

    def _add_cache(self, past: bindings.TensorSpec, present: str) -> None:
        sizes = {layer.ring_symbol: layer.ring_capacity for layer in self.layers}
        sizes[bindings.BATCH] = self.batch_size
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in past.shape)
        nbytes = prod(shape) * self.item_size
        self._shapes[past.name] = shape
        self._past[past.name] = self._buffers.reserve(past.name, nbytes, zeroed=True)
        self._present[present] = self._past[past.name]
        if past.name.rpartition(".")[2] in bindings.SINK_KINDS:
            self._present[present] = self._buffers.reserve(present, nbytes, zeroed=True)

    def _require_memory(self) -> None:
        free, total = self.cuda.memory()
        if self.max_nbytes > free:
            raise SessionError(
                f"the caches of {self.batch_size} streams take {human_bytes(self.max_nbytes)}, "
                f"this GPU has {human_bytes(free)} free of {human_bytes(total)}; use a smaller "
                "batch or export with a smaller --window-size"
            )


def message_log(trt: Any, target: logging.Logger) -> Any:
    """Return an ILogger that passes a library's messages on and remembers its errors.

    Errors reach the user as an exception, so in the log they are only information.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        target: where the messages go.
    """
    severity = trt.ILogger.Severity
    errors = (severity.ERROR, severity.INTERNAL_ERROR)
    levels = dict.fromkeys((*errors, severity.WARNING), logging.INFO)
    levels[severity.INFO] = logging.DEBUG

    class Messages(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in errors:
                self.errors.append(message)
            if level in levels:
                target.log(levels[level], "%s: %s", level.name.lower(), message.strip())

    return Messages()


def _load_libraries(engine: Engine) -> Libraries:
    package = _PACKAGES.get(engine.builder)
    if package is None:
        raise SessionError(
            f"this plan is of builder {engine.builder!r}; this lminf-export knows "
            f"{', '.join(_PACKAGES)}"
        )
    return Libraries(_import(package, engine.builder), _import("cuda.bindings.runtime", "cuda"))


def _import(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        # A missing shared library is an OSError or an ImportError, by release.
        package = {"cuda": "cuda-python"}.get(what, what)
        raise SessionError(
            f"this plan needs the Python package {package}, which does not load ({error}); "
            f"pip install {package}, or {_INSTEAD}"
        ) from error


def _check_target(engine: Engine, gpu: Gpu) -> None:
    """Compare the plan's target, such as "sm_89", "sm_80+" or "sm_75,sm_86", with the GPU."""
    own = gpu.compute_capability
    for target in engine.target.split(","):
        number = target.removeprefix("sm_").removesuffix("+")
        if not number.isdigit():
            continue
        wanted = divmod(int(number), 10)
        if own == wanted or (target.endswith("+") and own >= wanted):
            return
    raise SessionError(
        f"this plan is for {engine.target}, this machine's GPU ({gpu.name}) is {gpu.target}; "
        f"build it for this GPU, or {_INSTEAD}"
    )


def _check_version(engine: Engine, trt: Any) -> None:
    if trt.__version__ != engine.version:
        raise SessionError(
            f"this plan was built by {engine.builder} {engine.version}, installed is "
            f"{trt.__version__}; plans do not move between versions: install that version or "
            "build the plan again"
        )


def _deserialize(runtime: Any, path: Path, messages: Any) -> Any:
    # Mapped, so that the plan is not in memory twice.
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
    ):
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise SessionError(f"{path} cannot be loaded: {_reason(messages.errors)}; {_INSTEAD}")
    return engine


def _check_table(trt: Any, engine: Any, manifest: Manifest, path: Path) -> None:
    """Compare the engine's tensors with the manifest, rings at their full size."""
    rings = {layer.ring_symbol: layer.ring_capacity for layer in manifest.layer_specs}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = (
        (trt.TensorIOMode.INPUT, manifest.inputs),
        (trt.TensorIOMode.OUTPUT, manifest.outputs),
    )
    for mode, expected in modes:
        found = [name for name in names if engine.get_tensor_mode(name) == mode]
        if sorted(found) != sorted(row.name for row in expected):
            raise SessionError(f"{path} has other tensors than the manifest; build it again")
        for row in expected:
            shape = tuple(engine.get_tensor_shape(row.name))
            dtype = engine.get_tensor_dtype(row.name).name
            wanted = tuple(rings.get(dim, -1) if isinstance(dim, str) else dim for dim in row.shape)
            if (shape, _DTYPES.get(dtype)) != (wanted, row.dtype):
                other = Tensor(name=row.name, dtype=_DTYPES.get(dtype, dtype), shape=shape)
                raise SessionError(
                    f"{path} has {describe(other)}, the manifest says {describe(row)}; "
                    "build it again"
                )


def _check_aliases(engine: Any, manifest: Manifest, path: Path) -> None:
    """Every ring must be updated in place: one address serves past and present."""
    for index in range(len(manifest.layer_specs)):
        for kind in bindings.RING_KINDS:
            past, present = bindings.past_name(index, kind), bindings.present_name(index, kind)
            if engine.get_aliased_input_tensor(present) != past:
                raise SessionError(f"{path} does not update {past} in place; build it again")


def _reason(errors: Sequence[str]) -> str:
    return errors[0].strip().splitlines()[0] if errors and errors[0].strip() else "no reason given"
