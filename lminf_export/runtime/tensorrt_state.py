"""The state of a TensorRT session: caches on the GPU, and the small tensors of a step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import SessionError
from lminf_export.operator import bindings
from lminf_export.operator.bindings import TensorSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.runtime.cache import Bound, State
from lminf_export.runtime.gpu import Buffers, Cuda, Graph
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.snapshot_memory import numpy_dtype
from lminf_export.runtime.tensorrt_inputs import ALIGNMENT, SmallInputs


@dataclass(frozen=True)
class DeviceCache:
    """One cache tensor (B, G, slots, D) in the GPU's memory.

    Attributes:
        past: name of the graph's input.
        present: name of the graph's output.
        shape: of the streams it holds.
        dtype: of its elements.
        address: where the streams begin.
        written: where the engine writes them: the same, or for sink tokens another buffer.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: np.dtype
    address: int
    written: int

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of a stream."""
        return prod(self.shape[2:]) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one stream."""
        return self.shape[1] * self.head_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all streams."""
        return self.shape[0] * self.row_bytes

    @property
    def is_aligned(self) -> bool:
        """Whether TensorRT takes the address."""
        return not self.address % ALIGNMENT and not self.written % ALIGNMENT

    def rows(self, start: int, stop: int) -> DeviceCache:
        """Return the cache of some streams, in the same memory."""
        skipped = start * self.row_bytes
        shape = (stop - start, *self.shape[1:])
        address, written = self.address + skipped, self.written + skipped
        return DeviceCache(self.past, self.present, shape, self.dtype, address, written)


class TensorRTState(State):
    """Caches in the GPU's memory, full-sized from the start; freed with this object.

    Without the plugin the engine writes sink tokens to a second buffer, from which they are
    copied back while there are new ones.

    Args:
        cuda: the session's stream and memory.
        manifest: of the bundle; its engine says how caches are bound.
        batch_size: B.
        parent: the state of which this is a view.
        start: the parent's first stream that belongs to the view.
    """

    def __init__(
        self,
        cuda: Cuda,
        manifest: Manifest,
        batch_size: int,
        *,
        parent: TensorRTState | None = None,
        start: int = 0,
    ) -> None:
        contract = manifest.contract
        capacities = {size: size for size in contract.ring_capacities}
        lengths = (
            np.zeros(batch_size, np.int64)
            if parent is None
            else parent._bound.past_length[start : start + batch_size]
        )
        super().__init__(
            contract,
            Bound(capacities, lengths),
            state_id=manifest.state_id if parent is None else parent.state_id,
            is_full=True,
            parent=parent,
        )
        assert manifest.engine is not None
        self.cuda = cuda
        self._manifest = manifest
        self._double_sinks = not manifest.engine.sinks_in_place
        self._most_sinks = max(layer.num_sink_tokens for layer in contract.layers)
        if parent is None:
            self._require_memory()
        self._buffers = Buffers(cuda)
        weakref.finalize(self, self._buffers.free)
        self._caches: list[DeviceCache] = (
            self._new_caches(contract)
            if parent is None
            else [cache.rows(start, start + batch_size) for cache in parent._caches]
        )
        chunk = manifest.lambda_config.chunk_size
        # Single tokens have a block of their own, whose addresses a record may rely on.
        self._blocks = {
            single: SmallInputs(cuda, self._buffers, f"inputs {name}", batch_size, width, width)
            for single, name, width in ((True, "single", 1), (False, "chunk", chunk))
        }
        self._logits: dict[bool, np.ndarray] = {}
        self.decoder: Decoder | None = None

    @property
    def can_step(self) -> bool:
        """See `State.can_step`: TensorRT takes addresses in steps of 256 bytes."""
        return all(cache.is_aligned for cache in self._caches)

    @property
    def cache_addresses(self) -> list[int]:
        """Where every cache begins that past and present have in common."""
        return [cache.address for cache in self._caches if cache.address == cache.written]

    def take(self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray) -> bool:
        """Write a step's small inputs; returns whether the step is one of single tokens."""
        single = input_ids.shape[1] == 1 and logits_index.shape[1] == 1
        self._blocks[single].write(input_ids, self._bound.past_length, new_length, logits_index)
        shape = (*logits_index.shape, self.contract.vocab_size)
        logits = self._logits.get(single)
        if logits is None or logits.shape != shape:
            self._logits.pop(single, None)  # its memory may go
            nbytes = prod(shape) * np.dtype(np.float32).itemsize
            self._buffers.reserve(_logits(single), nbytes)
            host = self._buffers.reserve_host(_logits(single), nbytes)
            self._logits[single] = host[:nbytes].view(np.float32).reshape(shape)
        return single

    def send(self, single: bool) -> None:
        """Enqueue the copy of the small inputs to the GPU."""
        self._blocks[single].send()

    def receive(self, single: bool) -> None:
        """Enqueue the copy of the logits from the GPU."""
        self.cuda.receive(self._logits[single], self._buffers[_logits(single)])

    def inputs(self, single: bool) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return the address and shape of every input of the step loaded last."""
        caches = {cache.past: (cache.address, cache.shape) for cache in self._caches}
        return {**self._blocks[single].tensors(), **caches}

    def outputs(self, single: bool) -> dict[str, int]:
        """Return the address of every output."""
        caches = {cache.present: cache.written for cache in self._caches}
        return {bindings.LOGITS: self._buffers[_logits(single)], **caches}

    def finish(self, single: bool) -> np.ndarray:
        """Wait for the step; return the logits (B, K, V), valid until the next one."""
        if self._double_sinks and min(self._bound.past_length.tolist()) < self._most_sinks:
            for cache in self._caches:
                if cache.written != cache.address:
                    self.cuda.copy(cache.address, cache.written, cache.nbytes)
        self.cuda.synchronize()
        return self._logits[single]

    def keep_graph(self, graph: Graph) -> None:
        """Own a recorded step, which goes before the memory it works on."""
        self._buffers.graphs.append(graph)

    def _view(self, start: int, stop: int) -> TensorRTState:
        return TensorRTState(self.cuda, self._manifest, stop - start, parent=self, start=start)

    def _copy_row(self, source: int, target: int) -> None:
        lengths = self._bound.past_length
        length, lengths[target] = int(lengths[source]), 0
        for cache in self._caches:
            base, size = cache.address, cache.row_bytes
            self.cuda.copy(base + target * size, base + source * size, size)
        self.cuda.synchronize()
        lengths[target] = length

    def _reset(self) -> None:
        self._bound.past_length[...] = 0
        for cache in self._caches:
            self.cuda.zero(cache.address, cache.nbytes)
        self.cuda.synchronize()

    def _replace(self, snapshot: Snapshot) -> None:
        self._bound.past_length[...] = 0
        self._write_caches(snapshot.caches)
        self._bound.past_length[...] = snapshot.past_length

    def _fork(self) -> TensorRTState:
        new = TensorRTState(self.cuda, self._manifest, self.batch_size)
        for before, after in zip(self._caches, new._caches, strict=True):
            self.cuda.copy(after.address, before.address, before.nbytes)
        self.cuda.synchronize()
        new._bound.past_length[...] = self._bound.past_length
        return new

    def _read_caches(self, arrays: Mapping[str, np.ndarray]) -> None:
        for cache in self._caches:
            by_head = _by_head(arrays[cache.past])
            self.cuda.receive_rows(by_head, cache.address, cache.head_bytes)
        self.cuda.synchronize()

    def _write_caches(self, caches: Mapping[str, np.ndarray]) -> None:
        arrays = [np.ascontiguousarray(caches[cache.past]) for cache in self._caches]
        for cache, array in zip(self._caches, arrays, strict=True):
            if array.shape[2] < cache.shape[2]:
                self.cuda.zero(cache.address, cache.nbytes)
            self.cuda.send_rows(cache.address, cache.head_bytes, _by_head(array))
        self.cuda.synchronize()  # before the arrays go

    def _new_caches(self, contract: GraphContract) -> list[DeviceCache]:
        sinks = contract.sink_updates() if self._double_sinks else {}
        return [
            self._new_cache(past, present.name, twice=past.name in sinks)
            for past, present in zip(
                contract.caches(present=False), contract.caches(present=True), strict=True
            )
        ]

    def _new_cache(self, spec: TensorSpec, present: str, *, twice: bool) -> DeviceCache:
        sizes = {**self.contract.ring_sizes(), bindings.BATCH: self.batch_size}
        nbytes = spec.nbytes(sizes)
        address = self._buffers.reserve(spec.name, nbytes, zeroed=True)
        written = self._buffers.reserve(present, nbytes, zeroed=True) if twice else address
        return DeviceCache(
            spec.name, present, spec.sized(sizes), numpy_dtype(spec.dtype), address, written
        )

    def _require_memory(self) -> None:
        free, total = self.cuda.memory()
        if self.max_nbytes > free:
            raise SessionError(
                f"the caches of {self.batch_size} streams take {human_bytes(self.max_nbytes)}, "
                f"this GPU has {human_bytes(free)} free of {human_bytes(total)}; use a smaller "
                "batch or export with a smaller --window-size"
            )


class Decoder:
    """A state's own context for single tokens, run once directly and then launched from a record.

    A record belongs to its context and its addresses, so every state has one.

    Attributes:
        context: an IExecutionContext that has this state's shapes and addresses.
        graph: the recorded step, None before the second one.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.has_run = False
        self.graph: Graph | None = None


def _by_head(array: np.ndarray) -> np.ndarray:
    """Return the bytes of a contiguous array (B, G, slots, D) as (B · G, bytes of a head)."""
    batch, heads, slots, row = array.shape
    return array.reshape(-1).view(np.uint8).reshape(batch * heads, slots * row * array.itemsize)


def _logits(single: bool) -> str:
    return f"{bindings.LOGITS} {'single' if single else 'chunk'}"
