"""A state of streams in onnxruntime: caches that past and present share, bindings kept."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import SessionError
from lminf_export.operator import bindings
from lminf_export.runtime.cache import State, grown_capacity
from lminf_export.runtime.memory import zeros_together

Provider = Literal["cpu", "cuda"]

_ONNX_BFLOAT16 = 16


class OnnxRuntimeState(State):
    """Caches in memory that past and present share, and bindings kept between steps.

    On a CPU the rings start small and grow; on a GPU they are bound in full from the start.

    Attributes:
        session: onnxruntime's.
        run_seconds: spent inside its runs since the state was made.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, batch_size: int, provider: Provider
    ) -> None:
        contract = manifest.contract
        full = contract.ring_capacities
        start = dict.fromkeys(full, 0) if provider == "cpu" else {size: size for size in full}
        super().__init__(contract, batch_size, start)
        self.session = session
        self.run_seconds = 0.0
        self._on_device = provider != "cpu"
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
        start = time.perf_counter()
        self.session.run_with_iobinding(call.binding)
        self.run_seconds += time.perf_counter() - start
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
                step = 1 if cache.array.dtype == np.int8 else 8
                cache.array[...] = rng.integers(-8, 9, cache.array.shape) / step

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
        call = _Call(self.session, self._past_length, width, count, self.contract.vocab_size)
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
        specs = [self.contract.layer_caches(layer) for layer in self.contract.layers]
        sizes = {**self.contract.ring_sizes(self.capacities), bindings.BATCH: self.batch_size}
        # numpy has no bfloat16.
        shapes = [
            (spec.sized(sizes), spec.dtype.replace("bfloat16", "uint16"))
            for own in specs
            for spec in own
        ]
        arrays = iter(zeros_together(shapes))
        return [
            [_Cache(spec.name, next(arrays), spec.dtype, self._provider) for spec in own]
            for own in specs
        ]


class _Cache:
    """One cache tensor (B, G, slots, D), or scales (B, G, slots, 1); zeros at first."""

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
