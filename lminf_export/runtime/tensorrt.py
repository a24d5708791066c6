"""A bundle's plan in TensorRT or TensorRT for RTX, on an NVIDIA GPU.

Not yet executed on a GPU. Its use of both libraries is tested against their real Python
surfaces and with recording doubles; the numbers it yields are not checked here.

With the plugin all caches are updated in place and single tokens are played from a CUDA graph;
whether TensorRT copies caches all the same is asked of the plugin in the first steps.
Without it rings are updated in place, and sinks are written to a second buffer and copied back
while there are new ones, since nothing promises that the engine reads a sink before it writes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import SessionError, require_instance
from lminf_export.operator import bindings
from lminf_export.runtime.cache import State
from lminf_export.runtime.cache_use import (
    BOUND,
    DECLARED,
    CacheRecorder,
    CacheUse,
    cache_use,
    find_recorder,
)
from lminf_export.runtime.engine import (
    INSTEAD,
    Libraries,
    check_aliases,
    check_driver,
    check_table,
    check_target,
    check_version,
    deserialize,
    load_libraries,
    load_plugin,
    message_log,
    reason,
)
from lminf_export.runtime.gpu import Cuda, find_gpu
from lminf_export.runtime.inputs import checked_batch, require_step
from lminf_export.runtime.kernels import AUTO, KernelLibrary, find_kernels
from lminf_export.runtime.session import Receiver, Session
from lminf_export.runtime.tensorrt_state import Decoder, TensorRTState

logger = logging.getLogger(__name__)


class TensorRTSession(Session):
    """One engine, many states.

    Args:
        bundle: opened and checked; plan and plugin match the manifest's SHA-256. Both are
            executable code: nothing else is ever loaded, and `load` asks for trust before.
        cuda_graphs: run single tokens from a CUDA graph. Only engines with the plugin are
            recorded; an engine that cannot be recorded is an error.
        libraries: what to run on; by default what the manifest's builder needs.

    Raises:
        SessionError: no plan, no GPU, another GPU or another version than the plan is for, a
            missing Python package, a plugin TensorRT does not take, or an engine whose tensors
            are not those of the manifest.
    """

    def __init__(
        self, bundle: Bundle, *, cuda_graphs: bool = True, libraries: Libraries | None = None
    ) -> None:
        self.manifest = bundle.manifest
        self._vocab_size = bundle.manifest.vocab_size
        path, engine = bundle.plan_path, bundle.manifest.engine
        if path is None or engine is None:
            raise SessionError(f"{bundle.path} holds no plan; {INSTEAD}")
        # Asked of the driver first: TensorRT itself crashes where there is none.
        gpu = find_gpu()
        if isinstance(gpu, str):
            raise SessionError(
                f"this plan needs an NVIDIA GPU; none was found on this machine ({gpu}); {INSTEAD}"
            )
        check_target(engine, gpu)
        check_driver(bundle.plugin_path, gpu)
        libraries = libraries or load_libraries(engine)
        check_version(engine, libraries.trt)
        self._trt = libraries.trt
        self._cuda = Cuda(libraries.cudart)
        self._messages = message_log(libraries.trt, logger)
        self._runtime = libraries.trt.Runtime(self._messages)
        self._recorder: CacheRecorder | None = None
        self._cache_uses: dict[bool, CacheUse] = {}
        self._take_plugin(bundle)
        self._engine = deserialize(self._runtime, path, self._messages)
        check_table(libraries.trt, self._engine, self.manifest, path)
        if engine.plugin is None:
            check_aliases(self._engine, self.manifest, path)
        self._circular = engine.ring_writes == "circular"
        self._has_decoders = cuda_graphs and engine.plugin is not None
        self._work = None
        if self._has_decoders:
            self._work = self._cuda.work_memory(self._engine.device_memory_size_v2)
        # One context for each profile: changing a context's profile would cost a synchronisation.
        self._contexts = [self._context(index) for index in range(len(engine.profiles))]
        self._cuda.synchronize()
        self.max_batch_size = min(profile[bindings.BATCH][2] for profile in engine.profiles)

    @property
    def attention(self) -> str:
        """See `Session.attention`."""
        return "the engine"

    @property
    def library(self) -> KernelLibrary | None:
        """See `Session.library`."""
        return find_kernels(AUTO, "cpu")

    @property
    def caches_in_main_memory(self) -> bool:
        """See `Session.caches_in_main_memory`."""
        return False

    @property
    def cuda(self) -> Cuda:
        """The session's stream and the GPU's memory."""
        return self._cuda

    @property
    def cache_use(self) -> CacheUse | None:
        """How caches were updated, in the worst of the steps so far; None while it is not known."""
        return min(self._cache_uses.values(), key=lambda use: use.in_place, default=None)

    @property
    def cache_updates(self) -> str:
        """Whether caches were updated in place in the steps so far, in words."""
        if self.manifest.engine is not None and self.manifest.engine.plugin is None:
            return "rings in place, by TensorRT's own update"
        use = self.cache_use
        return use.description if use is not None else "not known: the plugin cannot be asked"

    def new_state(self, batch_size: int, *, full: bool = False) -> TensorRTState:
        """See `Session.new_state`; an engine's rings are always full."""
        batch_size = checked_batch(batch_size, full)
        if batch_size > self.max_batch_size:
            raise SessionError(
                f"batch_size={batch_size}: this plan takes at most {self.max_batch_size}; "
                "build it with a larger --max-batch-size"
            )
        return TensorRTState(self._cuda, self.manifest, batch_size)

    def owns(self, state: State) -> bool:
        """See `Session.owns`."""
        return isinstance(state, TensorRTState) and state.cuda is self._cuda

    def step_limit(self, state: State) -> int:
        """Return the largest S; where the engine writes linearly, none may cross a ring's end."""
        chunk_size = self.manifest.lambda_config.chunk_size
        if self._circular:
            return chunk_size
        room = (
            capacity - int(past) % capacity
            for capacity in state.capacities
            for past in state.past_length
        )
        return min(chunk_size, *room)

    def step(
        self,
        state: State,
        input_ids: np.ndarray,
        new_length: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        """See `Session.step`."""
        require_instance("state", state, TensorRTState)
        assert isinstance(state, TensorRTState)
        require_step(input_ids, new_length, logits_index, state.batch_size, self._vocab_size)
        assert input_ids.shape[1] <= self.step_limit(state), "a linear write would leave the ring"
        if not state.can_step:
            raise SessionError(
                "the streams of this view begin at an address that TensorRT does not take; step "
                "over a view that begins at stream 0, with lengths of 0 for the others"
            )
        wanted = logits_index.shape[1]
        if not wanted:
            # An engine's profile starts at one row.
            logits_index = np.zeros((state.batch_size, 1), np.int64)
        single = state.take(input_ids, new_length, logits_index)
        self._messages.errors.clear()
        start = time.perf_counter()
        if single and self._has_decoders:
            self._decode(state)
        else:
            # The first profile is for single tokens, the last takes everything.
            context = self._contexts[0 if single else -1]
            self._bind(context, state, single)
            self._enqueue(context, state, single)
        logits = state.finish(single)
        state.run_seconds += time.perf_counter() - start
        return logits[:, :wanted]

    def watch(self, names: Sequence[str], receive: Receiver) -> Session:
        """See `Session.watch`; an engine has no other values."""
        raise SessionError(
            f"an engine returns its outputs only, not {', '.join(names)}; load the bundle's "
            "folder to watch values of its graph in onnxruntime"
        )

    def _decode(self, state: TensorRTState) -> None:
        """Run single tokens: the first directly; the second is recorded and then launched."""
        decoder = state.decoder
        if decoder is None:
            decoder = Decoder(self._context(0))
            self._bind(decoder.context, state, True)
            state.decoder = decoder
        if not decoder.has_run:
            # The engine sets up its shapes in the first step, which cannot be recorded.
            self._enqueue(decoder.context, state, True)
            decoder.has_run = True
            return
        if decoder.graph is None:
            decoder.graph = self._record(decoder, state)
        decoder.graph.launch()

    def _record(self, decoder: Decoder, state: TensorRTState) -> Any:
        try:
            graph = self._cuda.record(lambda: self._enqueue(decoder.context, state, True))
        except SessionError as error:
            raise SessionError(
                f"the engine's step cannot be recorded in a CUDA graph: {error}; load the bundle "
                "with cuda_graphs=False (--no-cuda-graphs)"
            ) from error
        state.keep_graph(graph)
        return graph

    def _enqueue(self, context: Any, state: TensorRTState, single: bool) -> None:
        """Enqueue one step: copy of the small inputs, engine, copy of the logits."""
        state.send(single)
        if self._recorder is None or single in self._cache_uses:
            self._execute(context, state)
        else:
            bound = state.cache_addresses
            with self._recorder.recorded(len(bound)) as seen:
                self._execute(context, state)
            self._judge(cache_use(seen, bound), single)
        state.receive(single)

    def _execute(self, context: Any, state: TensorRTState) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise SessionError(
                f"the step at token {state.furthest} failed: {reason(self._messages.errors)}"
            )

    def _judge(self, use: CacheUse | None, single: bool) -> None:
        """Say once for each kind of step that caches are copied.

        It is no error: the logits are right, and what would help, another build, may take hours
        and another machine. But it is never silent.
        """
        if use is None:
            logger.info("whether caches are updated in place is not known: the plugin saw others")
            self._recorder = None
            return
        self._cache_uses[single] = use
        if use.in_place == use.caches:
            return
        assert self.manifest.engine is not None
        declared = self.manifest.engine.options.get("cache_aliasing", DECLARED) == DECLARED
        logger.warning(
            "this engine copies caches in every step of %s: %s; its logits are right, but it is "
            "slower and needs memory for the copies; build it again with --cache-aliasing %s",
            "single tokens" if single else "a chunk",
            use.description,
            BOUND if declared else DECLARED,
        )

    def _take_plugin(self, bundle: Bundle) -> None:
        plugin = self.manifest.engine.plugin if self.manifest.engine else None
        if plugin is None:
            return
        if plugin.embedded:
            # The plan's hash stands for what it carries.
            self._runtime.engine_host_code_allowed = True
            self._take_recorder(find_recorder(None))
            return
        assert bundle.plugin_path is not None
        registry = self._runtime.get_plugin_registry()
        self._plugin = load_plugin(registry, bundle.plugin_path, self._messages.errors)
        self._take_recorder(find_recorder(bundle.plugin_path))

    def _take_recorder(self, found: CacheRecorder | str) -> None:
        if isinstance(found, str):
            logger.info("whether caches are updated in place will not be known: %s", found)
        else:
            self._recorder = found

    def _context(self, profile: int) -> Any:
        """Return a context of a profile.

        Where every state has one of its own, all work in one memory, one after the other.
        """
        if self._work is None:
            context = self._engine.create_execution_context()
        else:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise SessionError(
                f"the engine cannot be made ready to run: {reason(self._messages.errors)}; "
                f"{INSTEAD}"
            )
        if self._work is not None:
            context.set_device_memory(self._work.address, self._work.nbytes)
        if not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise SessionError(f"the engine has no profile {profile}; build it again")
        return context

    def _bind(self, context: Any, state: TensorRTState, single: bool) -> None:
        for name, (address, shape) in state.inputs(single).items():
            if not context.set_input_shape(name, shape):
                raise SessionError(
                    f"the engine refuses {name} of shape {shape}: {reason(self._messages.errors)}"
                )
            context.set_tensor_address(name, address)
        for name, address in state.outputs(single).items():
            context.set_tensor_address(name, address)
