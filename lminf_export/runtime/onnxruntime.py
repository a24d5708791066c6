"""A bundle's graph in onnxruntime, with its caches bound in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from lminf_export import bindings
from lminf_export.bindings import LayerSpec
from lminf_export.bundle import Bundle
from lminf_export.config import as_integer
from lminf_export.errors import SessionError
from lminf_export.manifest import Manifest, Tensor, describe
from lminf_export.runtime.cache import State, grown_capacity, ring_capacities
from lminf_export.runtime.kernels import AUTO, KernelLibrary, find_kernels
from lminf_export.runtime.memory import zeros_together

logger = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda"]

_PROVIDER_NAMES: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ONNX_BFLOAT16 = 16
_ORT_TYPES = {
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}
# onnxruntime's exceptions share no base class of their own.
_ERRORS: tuple[type[Exception], ...] = (
    *(x for x in vars(ort_state).values() if isinstance(x, type) and issubclass(x, Exception)),
    RuntimeError,
    MemoryError,
)
_LOG_FATAL = 4
# Where a graph that comes as bytes finds its external data.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_MESSAGE_LENGTH = 600


class OnnxRuntimeSession:
    """One graph, many states.

    Args:
        bundle: opened and checked.
        provider: "cpu" or "cuda".
        threads: threads of one operator; None leaves the choice to onnxruntime.
        kernels: "auto", "none" or a library's path: see `find_kernels`.
        profile: beginning of the name of a file for onnxruntime's profile; None for no profile.
        graph: a serialised graph to run in the place of the bundle's, with the same inputs, and
            outputs that begin with its own.

    Raises:
        SessionError: the provider is missing or cannot run the type, the graph does not load,
            or its inputs and outputs are not those of the manifest.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        kernels: str | Path = AUTO,
        profile: Path | None = None,
        graph: bytes | None = None,
    ) -> None:
        self.manifest = bundle.manifest
        self.provider = provider
        _check_provider(provider, self.manifest)
        self.kernels = find_kernels(kernels, provider)
        logger.info("attention: %s", self.attention)
        options = _session_options(threads, self.kernels, profile)
        self._session = _open_session(bundle.graph_path, provider, options, graph)
        if self._session.get_providers()[0] != _PROVIDER_NAMES[provider]:
            raise SessionError(
                f"onnxruntime could not start its {provider} provider (its libraries or the "
                "device are missing); use provider='cpu' or mend the installation"
            )
        outputs = self._session.get_outputs()
        if graph is not None:
            outputs = outputs[: len(self.manifest.outputs)]
        for what, found, expected in (
            ("inputs", self._session.get_inputs(), self.manifest.inputs),
            ("outputs", outputs, self.manifest.outputs),
        ):
            _check_table(bundle.graph_path, what, found, expected)

    @property
    def caches_in_main_memory(self) -> bool:
        """Whether states take this machine's main memory."""
        return self.provider == "cpu"

    @property
    def attention(self) -> str:
        """What computes the attention, for people."""
        return self.kernels.description if self.kernels else "the graph's function body"

    def end_profiling(self) -> Path:
        """Return the profile's file, of everything run so far."""
        return Path(self._session.end_profiling())

    def new_state(self, batch_size: int) -> OnnxRuntimeState:
        """Return the state of B streams that have seen nothing."""
        with _as_session_error("cannot allocate the caches"):
            return OnnxRuntimeState(self._session, self.manifest, batch_size, self.provider)

    def owns(self, state: State) -> bool:
        """Say whether a state was made by this session."""
        return isinstance(state, OnnxRuntimeState) and state.session is self._session

    def step_limit(self, state: State) -> int:
        """Return the chunk size: the write may cross the ring's end."""
        return self.manifest.lambda_config.chunk_size

    def step(
        self,
        state: State,
        input_ids: np.ndarray,
        new_length: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        """Run S tokens of every stream: see `Session.step`."""
        assert isinstance(state, OnnxRuntimeState)
        try:
            return state.run(input_ids, new_length, logits_index)
        except _ERRORS as error:
            raise SessionError(
                f"the step at token {state.furthest} failed: {_line(error)}"
            ) from error


class OnnxRuntimeState(State):
    """Caches in memory that past and present share, and bindings kept between steps.

    On a CPU the rings start small and grow; on a GPU they are bound in full from the start.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, batch_size: int, provider: Provider
    ) -> None:
        full = ring_capacities(manifest.layer_specs)
        start = dict.fromkeys(full, 0) if provider == "cpu" else {size: size for size in full}
        super().__init__(manifest.layer_specs, batch_size, manifest.item_size, start)
        self.session = session
        self._vocab_size = manifest.vocab_size
        self._on_device = provider != "cpu"
        self._dtype = manifest.dtype
        self._provider = provider
        self._caches = self._new_caches()
        self._calls: dict[tuple[int, int], _Call] = {}
        self._room = _room(start)

    def run(
        self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray
    ) -> np.ndarray:
        """Run one step over the bound caches; (B, K, V) float32, overwritten by the next."""
        width, count = input_ids.shape[1], logits_index.shape[1]
        self._reserve(self._furthest + width)
        call = self._calls.get((width, count))
        if call is None:
            call = self._remember(width, count)
        np.copyto(call.input_ids, input_ids)
        np.copyto(call.new_length, new_length)
        np.copyto(call.logits_index, logits_index)
        if self._on_device:
            # Binding copies to the device, so what changed must be bound again.
            call.bind_inputs()
        self.session.run_with_iobinding(call.binding)
        return call.logits

    def stand_at(self, position: int) -> None:
        """Go to a position, in every stream, without reading what comes before it.

        For measurements: caches keep what they hold, and a step costs what it would.
        """
        self._reserve(position + 1)
        self._past_length[...] = position
        self._furthest = position

    def fill(self, rng: np.random.Generator, position: int) -> None:
        """Go to a position with rings and sinks full of random numbers (main memory only)."""
        self.stand_at(position)
        for cache in (cache for caches in self._caches for cache in caches):
            if not self._on_device:
                cache.array[...] = rng.integers(-8, 9, cache.array.shape) / 8

    @property
    def on_host(self) -> bool:
        """Whether the caches lie in main memory, so that they can be saved."""
        return not self._on_device

    def snapshot(self) -> dict[str, np.ndarray]:
        """Return copies of everything the streams have left behind, to go on from later.

        Raises:
            SessionError: the caches are on a device.
        """
        self._require_host()
        arrays = {
            bindings.past_name(index, cache.kind): cache.array.copy()
            for index, caches in enumerate(self._caches)
            for cache in caches
        }
        return {bindings.PAST_LENGTH: self.past_length, **arrays}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Stand where a snapshot of the same bundle was taken; this state must be new.

        Raises:
            SessionError: the caches are on a device, or the arrays are not of this bundle.
        """
        self._require_host()
        assert self._furthest == 0, "only a new state can be restored"
        filled = int(arrays[bindings.PAST_LENGTH].max())
        self._reserve(filled)
        for index, caches in enumerate(self._caches):
            for cache in caches:
                saved = arrays[bindings.past_name(index, cache.kind)]
                if cache.array.shape[:2] != saved.shape[:2] or cache.array.dtype != saved.dtype:
                    raise SessionError("the snapshot is of another bundle")
                slots = min(cache.array.shape[2], saved.shape[2])
                cache.array[:, :, :slots] = saved[:, :, :slots]
        self.advance(arrays[bindings.PAST_LENGTH])

    def _require_host(self) -> None:
        if not self.on_host:
            raise SessionError("only caches in main memory can be saved and restored")

    def _remember(self, width: int, count: int) -> _Call:
        """Prepare a call of this shape; single tokens and the latest other shape are kept."""
        self._calls = {shape: call for shape, call in self._calls.items() if shape == (1, 1)}
        call = _Call(self.session, self._past_length, width, count, self._vocab_size)
        for index, caches in enumerate(self._caches):
            for cache in caches:
                call.binding.bind_ortvalue_input(bindings.past_name(index, cache.kind), cache.value)
                call.binding.bind_ortvalue_output(
                    bindings.present_name(index, cache.kind), cache.value
                )
        self._calls[width, count] = call
        return call

    def _reserve(self, needed: int) -> None:
        """Bind larger rings if the step would not fit the present ones without wrapping."""
        if needed <= self._room:
            return
        wanted = {
            full: grown_capacity(bound, full, needed) for full, bound in self.capacities.items()
        }
        self._calls.clear()
        old, self.capacities = self._caches, wanted
        self._caches = self._new_caches()
        for before, after in zip(old, self._caches, strict=True):
            for source, target in zip(before, after, strict=True):
                target.take_over(source)
        self._room = _room(wanted)

    def _new_caches(self) -> list[list[_Cache]]:
        """Make the caches of all layers, of the present capacities."""
        kinds = [
            [*bindings.RING_KINDS, *(bindings.SINK_KINDS if layer.num_sink_tokens else ())]
            for layer in self.layers
        ]
        shapes = [
            self._cache_shape(layer, kind)
            for layer, own in zip(self.layers, kinds, strict=True)
            for kind in own
        ]
        # numpy has no bfloat16.
        arrays = iter(
            zeros_together(shapes, "uint16" if self._dtype == "bfloat16" else self._dtype)
        )
        return [
            [_Cache(kind, next(arrays), self._dtype, self._provider) for kind in own]
            for own in kinds
        ]

    def _cache_shape(self, layer: LayerSpec, kind: str) -> tuple[int, int, int, int]:
        is_ring = kind in bindings.RING_KINDS
        slots = self.capacities[layer.ring_capacity] if is_ring else layer.num_sink_tokens
        return (self.batch_size, layer.num_kv_heads, slots, layer.head_dim)


class _Cache:
    """One cache tensor (B, G, slots, D), zeros at first."""

    def __init__(self, kind: str, array: np.ndarray, dtype: str, provider: Provider) -> None:
        self.kind = kind
        self.array = array  # behind a CPU value it is shared, not copied
        self.value = _ort_value(array, dtype, provider)

    def take_over(self, old: _Cache) -> None:
        """Keep the tokens of a smaller cache: while it has not wrapped, slot = position."""
        self.array[:, :, : old.array.shape[2]] = old.array


class _Call:
    """A binding for one shape of step, its small inputs and its logits."""

    def __init__(
        self,
        session: ort.InferenceSession,
        past_length: np.ndarray,
        width: int,
        count: int,
        vocab_size: int,
    ) -> None:
        batch_size = len(past_length)
        self.binding = session.io_binding()
        self.input_ids = np.zeros((batch_size, width), np.int64)
        self.new_length = np.zeros(batch_size, np.int64)
        self.logits_index = np.zeros((batch_size, count), np.int64)
        self.logits = np.zeros((batch_size, count, vocab_size), np.float32)
        self._inputs = {
            bindings.INPUT_IDS: ort.OrtValue.ortvalue_from_numpy(self.input_ids),
            bindings.PAST_LENGTH: ort.OrtValue.ortvalue_from_numpy(past_length),
            bindings.NEW_LENGTH: ort.OrtValue.ortvalue_from_numpy(self.new_length),
            bindings.LOGITS_INDEX: ort.OrtValue.ortvalue_from_numpy(self.logits_index),
        }
        self.bind_inputs()
        self._logits_value = ort.OrtValue.ortvalue_from_numpy(self.logits)
        self.binding.bind_ortvalue_output(bindings.LOGITS, self._logits_value)

    def bind_inputs(self) -> None:
        """Bind the small inputs, which live on the CPU."""
        for name, value in self._inputs.items():
            self.binding.bind_ortvalue_input(name, value)


def _room(capacities: dict[int, int]) -> float:
    """Return the position up to which no ring must grow; infinite once all are full."""
    return min((bound for full, bound in capacities.items() if bound < full), default=math.inf)


def _ort_value(array: np.ndarray, dtype: str, provider: Provider) -> Any:
    if dtype == "bfloat16":
        host = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
        device = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, _ONNX_BFLOAT16, provider)
        ort.copy_tensors([host], [device])
        return device
    return ort.OrtValue.ortvalue_from_numpy(array, provider)


def _check_provider(provider: str, manifest: Manifest) -> None:
    if provider not in get_args(Provider):
        raise SessionError(f"provider={provider!r}: must be one of {', '.join(_PROVIDER_NAMES)}")
    if manifest.dtype == "bfloat16" and provider == "cpu":
        raise SessionError(
            "this bundle is bfloat16, which onnxruntime runs on GPUs only; use provider='cuda', "
            "its engine, or export again with --dtype float32"
        )
    available = ort.get_available_providers()
    if _PROVIDER_NAMES[provider] not in available:
        raise SessionError(
            f"this onnxruntime has no {provider} provider (it has {', '.join(available)}); "
            "install onnxruntime-gpu instead of onnxruntime, or use provider='cpu'"
        )


def _session_options(
    threads: int | None, kernels: KernelLibrary | None, profile: Path | None
) -> ort.SessionOptions:
    options = ort.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = as_integer("threads", threads, 1, SessionError)
    # What goes wrong arrives as an exception; the log would only repeat it on stderr.
    options.log_severity_level = _LOG_FATAL
    if kernels is not None:
        with _as_session_error(f"onnxruntime does not take the kernels of {kernels.path}"):
            options.register_custom_ops_library(str(kernels.path))
        # The library brings an allocator, too: packed weights stand on huge pages.
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _open_session(
    path: Path, provider: str, options: ort.SessionOptions, graph: bytes | None
) -> ort.InferenceSession:
    if graph is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
    with _as_session_error(f"onnxruntime cannot load {path}"):
        model = str(path) if graph is None else graph
        return ort.InferenceSession(model, options, providers=[_PROVIDER_NAMES[provider]])


def _check_table(path: Path, what: str, found: list[Any], expected: tuple[Tensor, ...]) -> None:
    table = [_as_tensor(x) for x in found]
    for index, row in enumerate(expected):
        other = table[index] if index < len(table) else None
        if other is None or not _same(other, row):
            raise SessionError(
                f"{path}: {what} {index} is {describe(other) if other else 'missing'}, the "
                f"manifest says {describe(row)}; export the model again"
            )
    if len(table) > len(expected):
        raise SessionError(
            f"{path}: {what} {len(expected)} is {describe(table[len(expected)])}, the manifest "
            "has none there; export the model again"
        )


def _as_tensor(found: Any) -> Tensor:
    # An unnamed dimension is None.
    shape = tuple("?" if dim is None else dim for dim in found.shape)
    return Tensor(name=found.name, dtype=_ORT_TYPES.get(found.type, found.type), shape=shape)


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the names of symbols, which a graph's optimiser may change."""
    numbers = tuple(x if isinstance(x, int) else None for x in found.shape)
    wanted = tuple(x if isinstance(x, int) else None for x in expected.shape)
    return (found.name, found.dtype, numbers) == (expected.name, expected.dtype, wanted)


@contextmanager
def _as_session_error(what: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise SessionError(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_LENGTH else text[:_MESSAGE_LENGTH] + " …"
