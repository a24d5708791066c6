"""One shape of step in onnxruntime: its binding, its small inputs and its logits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnxruntime as ort

from lminf_export.operator import bindings
from lminf_export.runtime.onnxruntime_caches import Cache


class Call(Protocol):
    """The binding for one shape of step, as a state uses it.

    Attributes:
        binding: of inputs and outputs.
    """

    binding: ort.IOBinding

    def run(
        self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Run a step.

        Args:
            input_ids: (B, S) int64.
            new_length: (B,) int64.
            logits_index: (B, K) int64.

        Returns:
            Logits (B, K, V) float32, overwritten by the next run, and the seconds of
            onnxruntime's run.
        """
        ...


class HostCall:
    """A binding to main memory, which the graph reads and writes where it lies.

    Args:
        session: onnxruntime's.
        past_length: (B,) int64, bound as it is.
        caches: bound to past and present.
        width: S.
        count: K.
        vocab_size: V.
        watched: outputs of the graph behind those of the contract.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        past_length: np.ndarray,
        caches: Sequence[Cache],
        width: int,
        count: int,
        vocab_size: int,
        watched: Sequence[str],
    ) -> None:
        batch_size = len(past_length)
        self._session = session
        self.binding = session.io_binding()
        self._input_ids = np.zeros((batch_size, width), np.int64)
        self._new_length = np.zeros(batch_size, np.int64)
        self._logits_index = np.zeros((batch_size, count), np.int64)
        self.logits = np.zeros((batch_size, count, vocab_size), np.float32)
        self._values = {
            bindings.INPUT_IDS: ort.OrtValue.ortvalue_from_numpy(self._input_ids),
            bindings.PAST_LENGTH: ort.OrtValue.ortvalue_from_numpy(past_length),
            bindings.NEW_LENGTH: ort.OrtValue.ortvalue_from_numpy(self._new_length),
            bindings.LOGITS_INDEX: ort.OrtValue.ortvalue_from_numpy(self._logits_index),
        }
        for name, value in self._values.items():
            self.binding.bind_ortvalue_input(name, value)
        self._logits_value = ort.OrtValue.ortvalue_from_numpy(self.logits)
        self.binding.bind_ortvalue_output(bindings.LOGITS, self._logits_value)
        bind_others(self.binding, caches, watched)

    def run(
        self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """See `Call.run`."""
        np.copyto(self._input_ids, input_ids)
        np.copyto(self._new_length, new_length)
        np.copyto(self._logits_index, logits_index)
        start = time.perf_counter()
        self._session.run_with_iobinding(self.binding)
        return self.logits, time.perf_counter() - start


def bind_others(binding: ort.IOBinding, caches: Sequence[Cache], watched: Sequence[str]) -> None:
    """Bind caches to past and present, and let onnxruntime allocate watched values."""
    for cache in caches:
        cache.bind(binding)
    for name in watched:
        binding.bind_output(name)
