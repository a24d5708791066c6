"""A state of streams in onnxruntime: caches that past and present share, bindings kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from lminf_export.operator import bindings
from lminf_export.operator.bindings import TensorSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.runtime.cache import State, grown_capacity
from lminf_export.runtime.memory import zeros_together
from lminf_export.runtime.options import Provider
from lminf_export.runtime.snapshot import numpy_dtype

_ONNX_BFLOAT16 = 16


class OnnxRuntimeState(State):
    """Caches in memory that past and present share, and bindings kept between steps.

    On a CPU the rings start small and grow; on a GPU they are bound in full from the start.

    Args:
        session: onnxruntime's.
        contract: of its graph.
        batch_size: B.
        provider: where the caches are.
        watched: outputs of the graph behind those of the contract, kept after every step.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        contract: GraphContract,
        batch_size: int,
        provider: Provider,
        watched: Sequence[str] = (),
    ) -> None:
        on_device = provider != "cpu"
        start = {full: full if on_device else 0 for full in contract.ring_capacities}
        super().__init__(contract, batch_size, start)
        self.session = session
        self._on_device = on_device
        self._provider = provider
        self._watched = tuple(watched)
        self._caches = self._new_caches()
        self._calls: dict[tuple[int, int], _Call] = {}
        self._latest: _Call | None = None
        self._room = _room(start)

    def run(
        self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray
    ) -> np.ndarray:
        """Run one step over the bound caches; (B, K, V) float32, overwritten by the next."""
        width, count = input_ids.shape[1], logits_index.shape[1]
        self._reserve(self._furthest + width)
        call = self._calls.get((width, count))
        if call is None:
            call = self._prepare_call(width, count)
        np.copyto(call.input_ids, input_ids)
        np.copyto(call.new_length, new_length)
        np.copyto(call.logits_index, logits_index)
        if self._on_device:
            # Binding copies to the device, so what changed must be bound again.
            call.bind_inputs()
        start = time.perf_counter()
        self.session.run_with_iobinding(call.binding)
        self.run_seconds += time.perf_counter() - start
        self._latest = call
        return call.logits

    def ring_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """See `State.ring_rows`."""
        cache = next(cache for cache in self._caches if cache.past == name)
        content = cache.array if not self._on_device else cache.read()
        return content[:, :, np.arange(start, stop) % content.shape[2]]

    def watched_values(self) -> dict[str, np.ndarray]:
        """Return copies of the watched outputs of the latest step, by name."""
        if not self._watched or self._latest is None:
            return {}
        outputs = self._latest.binding.get_outputs()[-len(self._watched) :]
        return {
            name: value.numpy().copy() for name, value in zip(self._watched, outputs, strict=True)
        }

    def _prepare_call(self, width: int, count: int) -> _Call:
        """Bind a call of this shape; single tokens and the latest other shape are kept."""
        self._calls = {shape: call for shape, call in self._calls.items() if shape == (1, 1)}
        call = _Call(self.session, self._past_length, width, count, self.contract.vocab_size)
        for cache in self._caches:
            call.binding.bind_ortvalue_input(cache.past, cache.value)
            call.binding.bind_ortvalue_output(cache.present, cache.value)
        for name in self._watched:
            call.binding.bind_output(name)
        self._calls[width, count] = call
        return call

    def _reserve(self, needed: int) -> None:
        """Bind larger rings if positions would not fit the present ones without wrapping."""
        if needed <= self._room:
            return
        old = self._caches
        self._bind(
            {full: grown_capacity(bound, full, needed) for full, bound in self.capacities.items()}
        )
        for before, after in zip(old, self._caches, strict=True):
            after.write(before.array)

    def _bind(self, capacities: Mapping[int, int]) -> None:
        if self._on_device or capacities == self.capacities:
            return
        self._calls.clear()
        self._latest = None
        self.capacities = dict(capacities)
        self._caches = self._new_caches()
        self._room = _room(self.capacities)

    def _read_caches(self) -> dict[str, np.ndarray]:
        return {cache.past: cache.read() for cache in self._caches}

    def _write_caches(self, caches: Mapping[str, np.ndarray]) -> None:
        for cache in self._caches:
            cache.write(caches[cache.past])

    def _new_caches(self) -> list[_Cache]:
        """Make the caches of all layers, of the present capacities, in graph order."""
        sizes = {**self.contract.ring_sizes(self.capacities), bindings.BATCH: self.batch_size}
        past, present = (list(self.contract.caches(present=which)) for which in (False, True))
        arrays = zeros_together([(spec.sized(sizes), numpy_dtype(spec.dtype)) for spec in past])
        return [
            _Cache(spec, output.name, array, self._provider)
            for spec, output, array in zip(past, present, arrays, strict=True)
        ]


class _Cache:
    """One cache tensor (B, G, slots, D), or scales (B, G, slots, 1); zeros at first.

    Attributes:
        past: name of the graph's input.
        present: name of the graph's output, which is the same memory.
        array: of the cache's shape and type; on a CPU the cache's memory itself.
        value: what is bound.
    """

    def __init__(
        self, spec: TensorSpec, present: str, array: np.ndarray, provider: Provider
    ) -> None:
        self.past, self.present = spec.name, present
        self.array = array
        self.value = _ort_value(array, spec.dtype, provider)
        self._is_shared = provider == "cpu"
        self._dtype = spec.dtype

    def read(self) -> np.ndarray:
        """Return a copy of the content."""
        if self._dtype != "bfloat16":
            return self.array.copy() if self._is_shared else self.value.numpy()
        copy = np.empty_like(self.array)
        ort.copy_tensors([self.value], [_bfloat16_value(copy)])
        return copy

    def write(self, content: np.ndarray) -> None:
        """Replace the first slots; the others become zeros.

        While a ring has not wrapped, slot = position, so a ring of other size keeps its tokens.
        """
        slots = min(content.shape[2], self.array.shape[2])
        self.array[:, :, :slots] = content[:, :, :slots]
        self.array[:, :, slots:] = 0
        if self._is_shared:
            return
        if self._dtype == "bfloat16":
            ort.copy_tensors([_bfloat16_value(self.array)], [self.value])
        else:
            self.value.update_inplace(self.array)


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
    if dtype != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(array, provider)
    device = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, _ONNX_BFLOAT16, provider)
    ort.copy_tensors([_bfloat16_value(array)], [device])
    return device


def _bfloat16_value(array: np.ndarray) -> Any:
    """Return a value over the memory of a uint16 array."""
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
