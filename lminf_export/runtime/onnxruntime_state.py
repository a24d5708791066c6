"""A state of streams in onnxruntime: caches that past and present share, bindings kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort

from lminf_export.errors import InputError
from lminf_export.operator import bindings
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import as_integer, require_one_of
from lminf_export.runtime.arrays import assign_together, zeros_together
from lminf_export.runtime.cache import Bound, State, grown_capacity, restored_capacity
from lminf_export.runtime.memory import require_free
from lminf_export.runtime.onnxruntime_caches import Cache, DeviceCache, SharedCache
from lminf_export.runtime.onnxruntime_call import Call, HostCall
from lminf_export.runtime.onnxruntime_cuda import CudaCall, CudaGraphs
from lminf_export.runtime.options import Provider
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.snapshot_memory import numpy_dtype, used_slots


@dataclass
class OnnxRuntimeBound(Bound):
    """Caches of one size, and what is bound to them.

    Attributes:
        caches: of all layers, in graph order.
        room: the position up to which no ring must grow; infinite once all are full.
        calls: S and K → the binding of steps of that shape.
        latest: the call of the latest step.
    """

    caches: Sequence[Cache]
    room: float = math.inf
    calls: dict[tuple[int, int], Call] = field(default_factory=dict)
    latest: Call | None = None


class OnnxRuntimeState(State):
    """Caches in memory that past and present share, and bindings kept between steps.

    On a CPU the rings start small and grow; on a GPU they are bound in full from the start.

    Args:
        session: onnxruntime's.
        contract: of its graph.
        bound: caches and lengths, see `new_bound`.
        provider: where the caches are.
        graphs: CUDA graphs of the session.
        watched: outputs of the graph behind those of the contract, kept after every step.
        state_id: see `State`.
        is_full: see `State`.
        parent: see `State`.
    """

    _bound: OnnxRuntimeBound

    def __init__(
        self,
        session: ort.InferenceSession,
        contract: GraphContract,
        bound: OnnxRuntimeBound,
        provider: Provider,
        graphs: CudaGraphs,
        watched: Sequence[str] = (),
        *,
        state_id: str,
        is_full: bool = False,
        parent: State | None = None,
    ) -> None:
        super().__init__(contract, bound, state_id=state_id, is_full=is_full, parent=parent)
        self.session = session
        self._on_device = provider != "cpu"
        self._provider = provider
        self._graphs = graphs
        self._watched = tuple(watched)

    def run(
        self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray
    ) -> np.ndarray:
        """Run one step over the bound caches; (B, K, V) float32, overwritten by the next."""
        width, count = input_ids.shape[1], logits_index.shape[1]
        if not self.is_full:
            self._reserve(self.furthest + width)
        bound = self._bound
        call = bound.calls.get((width, count))
        if call is None:
            call = self._prepare_call(width, count)
        logits, seconds = call.run(input_ids, new_length, logits_index)
        self.run_seconds += seconds
        bound.latest = call
        return logits

    def ring_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """See `State.ring_rows`."""
        widest = max(self._bound.capacities.values(), default=0)
        start = as_integer("start", start, 0, InputError)
        stop = as_integer("stop", stop, start, InputError, maximum=start + widest)
        names = [cache.past for cache in self._bound.caches]
        require_one_of("name", name, names, InputError)
        content = self._bound.caches[names.index(name)].content()
        return content[:, :, np.arange(start, stop) % content.shape[2]]

    def watched_values(self) -> dict[str, np.ndarray]:
        """Return copies of the watched outputs of the latest step, by name."""
        latest = self._bound.latest
        if not self._watched or latest is None:
            return {}
        outputs = latest.binding.get_outputs()[-len(self._watched) :]
        return {
            name: value.numpy().copy() for name, value in zip(self._watched, outputs, strict=True)
        }

    def _prepare_call(self, width: int, count: int) -> Call:
        """Bind a call of this shape; single tokens and the latest other shape are kept."""
        bound = self._bound
        rest = (bound.past_length, bound.caches, width, count)
        outputs = (self.contract.vocab_size, self._watched)
        call: Call
        if self._on_device:
            call = CudaCall(self.session, self._graphs, *rest, *outputs)
        else:
            call = HostCall(self.session, *rest, *outputs)
        kept = {shape: call for shape, call in bound.calls.items() if shape == (1, 1)}
        bound.calls = {**kept, (width, count): call}
        return call

    def _view(self, start: int, stop: int) -> OnnxRuntimeState:
        bound = OnnxRuntimeBound(
            self._bound.capacities,
            self._bound.past_length[start:stop],
            [cache.rows(start, stop) for cache in self._bound.caches],
        )
        return OnnxRuntimeState(
            self.session,
            self.contract,
            bound,
            self._provider,
            self._graphs,
            self._watched,
            state_id=self.state_id,
            is_full=True,
            parent=self,
        )

    def _fork(self) -> OnnxRuntimeState:
        if not self._on_device:
            require_free(self.max_nbytes, self.batch_size)
        old = self._bound
        new = new_bound(self.contract, self.batch_size, old.capacities, self._provider)
        used = used_slots(self.contract, self.furthest)
        for before, after in zip(old.caches, new.caches, strict=True):
            after.write(before.content()[:, :, : used[before.past]])
        new.past_length[...] = old.past_length
        return OnnxRuntimeState(
            self.session,
            self.contract,
            new,
            self._provider,
            self._graphs,
            self._watched,
            state_id=self.state_id,
            is_full=self.is_full,
        )

    def _reserve(self, needed: int) -> None:
        """Bind larger rings if positions would not fit the present ones without wrapping."""
        old = self._bound
        if needed <= old.room:
            return
        new = new_bound(
            self.contract,
            self.batch_size,
            {full: grown_capacity(size, full, needed) for full, size in old.capacities.items()},
        )
        for before, after in zip(old.caches, new.caches, strict=True):
            content = before.content()
            after.content()[:, :, : content.shape[2]] = content
        new.past_length[...] = old.past_length
        self._bound = new

    def _copy_row(self, source: int, target: int) -> None:
        lengths = self._bound.past_length
        if not self._on_device:
            arrays = [*(cache.content() for cache in self._bound.caches), lengths[:, None]]
            assign_together([x[target] for x in arrays], [x[source] for x in arrays])
            return
        length, lengths[target] = int(lengths[source]), 0
        for cache in self._bound.caches:
            content = cache.content()
            content[target] = content[source]
            cache.write(content)
        lengths[target] = length

    def _reset(self) -> None:
        self._bound.past_length[...] = 0
        for cache in self._bound.caches:
            cache.clear()

    def _replace(self, snapshot: Snapshot) -> None:
        bound = self._bound
        if self._on_device:
            bound.past_length[...] = 0
            self._write_caches(snapshot.caches)
            bound.past_length[...] = snapshot.past_length
            return
        capacities = {
            full: size if self.is_full else restored_capacity(size, full, snapshot.furthest)
            for full, size in bound.capacities.items()
        }
        if capacities != bound.capacities:
            bound = new_bound(self.contract, self.batch_size, capacities)
        tails: list[np.ndarray] = []
        targets = [cache.content() for cache in bound.caches]
        sources = [snapshot.caches[cache.past] for cache in bound.caches]
        for place, (array, content) in enumerate(zip(targets, sources, strict=True)):
            if content.shape != array.shape:
                slots = content.shape[2]
                targets[place] = array[:, :, :slots]
                tails.append(array[:, :, slots:])
        targets += [*tails, bound.past_length]
        sources += [*(np.zeros((), tail.dtype) for tail in tails), snapshot.past_length]
        assign_together(targets, sources)
        self._bound = bound

    def _read_caches(self, arrays: Mapping[str, np.ndarray]) -> None:
        targets = list(arrays.values())
        sources = [cache.content() for cache in self._bound.caches]
        if self.furthest < max(self._bound.capacities.values(), default=0):
            sources = [
                content[:, :, : array.shape[2]]
                for content, array in zip(sources, targets, strict=True)
            ]
        assign_together(targets, sources)

    def _write_caches(self, caches: Mapping[str, np.ndarray]) -> None:
        for cache in self._bound.caches:
            cache.write(caches[cache.past])


def new_bound(
    contract: GraphContract,
    batch_size: int,
    capacities: Mapping[int, int],
    provider: Provider = "cpu",
) -> OnnxRuntimeBound:
    """Return caches of zeros, and lengths of zero.

    Args:
        contract: of the graph.
        batch_size: B.
        capacities: full capacity → slots to bind.
        provider: where the caches are.
    """
    sizes = {**contract.ring_sizes(capacities), bindings.BATCH: batch_size}
    past, present = (list(contract.caches(present=which)) for which in (False, True))
    caches: list[Cache]
    if provider == "cpu":
        arrays = zeros_together([(spec.sized(sizes), numpy_dtype(spec.dtype)) for spec in past])
        caches = [
            SharedCache(spec.name, output.name, array)
            for spec, output, array in zip(past, present, arrays, strict=True)
        ]
    else:
        caches = [
            DeviceCache.zeros(spec, output.name, spec.sized(sizes), provider)
            for spec, output in zip(past, present, strict=True)
        ]
    room = min((size for full, size in capacities.items() if size < full), default=math.inf)
    return OnnxRuntimeBound(dict(capacities), np.zeros(batch_size, np.int64), caches, room)
