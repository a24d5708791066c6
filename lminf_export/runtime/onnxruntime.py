"""A bundle's graph in onnxruntime, with its caches bound in place."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from lminf_export.bundle.files import require_utf8
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import SessionError, require_instance, shortened
from lminf_export.operator.settings import as_integer, require_one_of
from lminf_export.runtime import onnxruntime_cuda
from lminf_export.runtime.cache import State
from lminf_export.runtime.inputs import checked_batch, require_step
from lminf_export.runtime.kernels import AUTO, KernelLibrary, find_kernels
from lminf_export.runtime.onnxruntime_cuda import CudaGraphs
from lminf_export.runtime.onnxruntime_state import OnnxRuntimeState, new_bound
from lminf_export.runtime.onnxruntime_tables import require_table, with_outputs
from lminf_export.runtime.options import PROVIDERS, Provider
from lminf_export.runtime.read_ahead import read_ahead
from lminf_export.runtime.session import Receiver, Session

logger = logging.getLogger(__name__)

_PROVIDER_NAMES: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": onnxruntime_cuda.NAME}
# onnxruntime's exceptions share no base class of their own.
_ERRORS: tuple[type[Exception], ...] = (
    *(x for x in vars(ort_state).values() if isinstance(x, type) and issubclass(x, Exception)),
    RuntimeError,
    MemoryError,
    # Its messages, and the names in a graph, need not be UTF-8.
    UnicodeError,
)
_LOG_FATAL = 4
# Part of the message by which onnxruntime refuses to capture a graph.
_CANNOT_CAPTURE = "cannot use the graph capture feature"
_NO_PACKED_WEIGHTS = "session.disable_prepacking"
_WEIGHTS_BESIDE_THE_ARENA = "session.use_device_allocator_for_initializers"
# Where a graph that comes as bytes finds its external data.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_MESSAGE_LENGTH = 150
# onnxruntime makes as many as it is told to.
_MOST_THREADS = 1024
# The place in onnxruntime's own source that its messages begin with.
_SOURCE_PLACE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\) ")


class OnnxRuntimeSession(Session):
    """One graph, many states.

    Args:
        bundle: opened and checked.
        provider: "cpu" or "cuda".
        threads: threads of one operator; None leaves the choice to onnxruntime.
        kernels: "auto", "none" or a library's path: see `find_kernels`.
        profile: beginning of the name of a file for onnxruntime's profile; None for no profile.
        graph: a serialised graph to run in the place of the bundle's, with the same inputs, and
            outputs that begin with its own.
        watched: values of the graph to return from every step.
        receive: called after every step with the watched values.
        lean: make no copies of weights that are faster to compute with, for a few steps.
        cuda_graphs: on a GPU, play single tokens from a CUDA graph; `cuda_graph` says whether
            that was possible.

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
        watched: Sequence[str] = (),
        receive: Receiver | None = None,
        lean: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        self.manifest = bundle.manifest
        self._vocab_size = bundle.manifest.vocab_size
        self._state_id = self.manifest.state_id
        self.provider = provider
        self._watched, self._receive = tuple(watched), receive
        self._reopen = partial(
            OnnxRuntimeSession,
            bundle,
            provider=provider,
            threads=threads,
            kernels=kernels,
            cuda_graphs=cuda_graphs,
        )
        self._graph = graph
        _check_provider(provider, self.manifest)
        self.kernels = find_kernels(
            kernels, provider, self.manifest.kv_cache_dtype, _head_dims(self.manifest)
        )
        is_auto = self.kernels is None and str(kernels) == AUTO
        self._library = find_kernels(AUTO, "cpu") if is_auto else self.kernels
        options = _session_options(threads, self.kernels, profile)
        if lean:
            options.add_session_config_entry(_NO_PACKED_WEIGHTS, "1")
        if watched:
            graph = with_outputs(
                bundle.graph_path.read_bytes() if graph is None else graph, watched
            )
        if provider == "cpu" and self.kernels is not None and not lean:
            read_ahead(bundle.path / name for name in self.manifest.files_of("weights"))
        # Weights that onnxruntime does not map itself live as long as the session.
        self._weights: list[np.ndarray] = []
        if graph is not None:
            names = self.manifest.files_of("weights")
            self._weights = weights_of_bytes(bundle.path, names, options)
        refusal = _no_graphs(provider, cuda_graphs, profile, watched)
        self._session, self._graphs = _open_with_graphs(
            bundle.graph_path, provider, options, graph, refusal, lean=lean
        )
        logger.info("attention: %s", self.attention)
        if provider != "cpu":
            logger.info("CUDA graph: %s", self.cuda_graph)
        if self._session.get_providers()[0] != _PROVIDER_NAMES[provider]:
            raise SessionError(
                f"onnxruntime could not start its {provider} provider (its libraries or the "
                "device are missing); use provider='cpu' or mend the installation"
            )
        with _as_session_error(f"onnxruntime cannot name the inputs of {bundle.graph_path}"):
            self._check_tables(bundle.graph_path, whole=graph is None)

    def _check_tables(self, path: Path, *, whole: bool) -> None:
        outputs = self._session.get_outputs()
        if not whole:
            outputs = outputs[: len(self.manifest.outputs)]
        for what, found, expected in (
            ("inputs", self._session.get_inputs(), self.manifest.inputs),
            ("outputs", outputs, self.manifest.outputs),
        ):
            require_table(path, what, found, expected)

    @property
    def caches_in_main_memory(self) -> bool:
        """See `Session.caches_in_main_memory`."""
        return self.provider == "cpu"

    @property
    def library(self) -> KernelLibrary | None:
        """See `Session.library`."""
        return self._library

    @property
    def attention(self) -> str:
        """See `Session.attention`."""
        if self.kernels is None:
            return "the graph's function body"
        return self.kernels.description if self.provider == "cpu" else self.kernels.path.name

    @property
    def cuda_graph(self) -> str:
        """Whether single tokens are played from a CUDA graph: yes, or no and why."""
        return self._graphs.description

    def end_profiling(self) -> Path:
        """End profiling and return the profile's file; it has every run of the session."""
        return Path(self._session.end_profiling())

    def new_state(self, batch_size: int, *, full: bool = False) -> OnnxRuntimeState:
        """See `Session.new_state`."""
        batch_size = checked_batch(batch_size, full)
        contract = self.manifest.contract
        is_full = full or self.provider != "cpu"
        capacities = {size: size if is_full else 0 for size in contract.ring_capacities}
        with _as_session_error("cannot allocate the caches"):
            return OnnxRuntimeState(
                self._session,
                contract,
                new_bound(contract, batch_size, capacities, self.provider),
                self.provider,
                self._graphs,
                self._watched,
                state_id=self._state_id,
                is_full=is_full,
            )

    def owns(self, state: State) -> bool:
        """See `Session.owns`."""
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
        """See `Session.step`."""
        require_instance("state", state, OnnxRuntimeState)
        assert isinstance(state, OnnxRuntimeState)
        require_step(input_ids, new_length, logits_index, state.batch_size, self._vocab_size)
        try:
            logits = state.run(input_ids, new_length, logits_index)
        except _ERRORS as error:
            raise SessionError(
                f"the step at token {state.furthest} failed: {_line(error)}"
            ) from error
        if self._receive is not None:
            self._receive(state.watched_values())
        return logits

    def watch(self, names: Sequence[str], receive: Receiver) -> OnnxRuntimeSession:
        """See `Session.watch`; the graph is loaded once more, its weights stay mapped."""
        return self._reopen(graph=self._graph, watched=names, receive=receive)


def _check_provider(provider: str, manifest: Manifest) -> None:
    require_one_of("provider", provider, PROVIDERS, SessionError)
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
        options.intra_op_num_threads = as_integer(
            "threads", threads, 1, SessionError, maximum=_MOST_THREADS
        )
    # What goes wrong arrives as an exception; the log would only repeat it on stderr.
    options.log_severity_level = _LOG_FATAL
    if kernels is not None:
        require_utf8(kernels.path, SessionError)
        with _as_session_error(f"onnxruntime does not take the kernels of {kernels.path}"):
            options.register_custom_ops_library(str(kernels.path))
        # The library brings an allocator, too: packed weights stand on huge pages.
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _head_dims(manifest: Manifest) -> set[int]:
    return {layer.head_dim for layer in manifest.contract.layers}


def _no_graphs(
    provider: str, cuda_graphs: bool, profile: Path | None, watched: Sequence[str]
) -> str | None:
    """Return why no CUDA graph is to be captured; None where one is."""
    if provider != "cuda":
        return f"the provider is {provider}"
    if not cuda_graphs:
        return "it was not asked for"
    if profile is not None:
        return "a graph has no operators that a profile could time"
    return "values of the graph are watched" if watched else None


def _open_with_graphs(
    path: Path,
    provider: str,
    options: ort.SessionOptions,
    graph: bytes | None,
    refusal: str | None,
    *,
    lean: bool,
) -> tuple[ort.InferenceSession, CudaGraphs]:
    """Open a session that captures, or, where onnxruntime refuses that, one that does not."""
    if provider == "cuda":
        onnxruntime_cuda.preload_libraries()
    open_session = partial(_open_session, path, provider, options, graph, lean=lean)
    if refusal is None:
        try:
            return open_session(graphs=True), CudaGraphs(None)
        except SessionError as error:
            if _CANNOT_CAPTURE not in str(error.__cause__):
                raise
        refusal = (
            "onnxruntime runs part of this graph on the CPU; a bundle of an earlier release has "
            "to be exported again"
        )
        logger.warning("CUDA graph: no, because %s", refusal)
    return open_session(graphs=False), CudaGraphs(refusal)


def _open_session(
    path: Path,
    provider: str,
    options: ort.SessionOptions,
    graph: bytes | None,
    *,
    lean: bool,
    graphs: bool,
) -> ort.InferenceSession:
    require_utf8(path, SessionError)
    settings = {}
    if provider == "cuda":
        settings = onnxruntime_cuda.provider_options(graphs=graphs)
        # Its arena would double what it takes from the GPU each time, for weights of any size.
        options.add_session_config_entry(_WEIGHTS_BESIDE_THE_ARENA, "1")
    with _as_session_error(f"onnxruntime cannot load {path}"):
        return ort.InferenceSession(
            str(path) if graph is None else graph,
            options,
            providers=[(_PROVIDER_NAMES[provider], settings)],
            enable_fallback=0,  # a second try would print, and fail in the same way
            # Folding would convert all weights of half precision for kernels that have none.
            disabled_optimizers=["ConstantFolding"] if lean else None,
        )


def weights_of_bytes(
    folder: Path, names: Sequence[str], options: ort.SessionOptions
) -> list[np.ndarray]:
    """Tell where a graph that comes as bytes has its weights; return those that are handed over.

    In the hub's cache files are links out of their folder, which onnxruntime does not follow
    for such a graph.

    Args:
        folder: of the weights.
        names: their files in it.
        options: of the session; what is returned must live as long as that.
    """
    if not any((folder / name).is_symlink() for name in names):
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        return []
    contents = [np.memmap(folder / name, np.uint8, "r") for name in names]
    lengths = [content.nbytes for content in contents]
    options.add_external_initializers_from_files_in_memory(names, contents, lengths)
    return list(contents)


@contextmanager
def _as_session_error(what: str) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise SessionError(f"{what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Return an exception's text as one line."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        # What could not be decoded is the message of the exception that was to be raised.
        text = bytes(error.object).decode("utf-8", "backslashreplace")
    text = _SOURCE_PLACE.sub("", " ".join(text.split()))
    return shortened(text or type(error).__name__, _MESSAGE_LENGTH)
