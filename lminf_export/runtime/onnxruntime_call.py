"""One shape of step in onnxruntime: its binding, its small inputs and its logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from lminf_export.operator import bindings
from lminf_export.runtime.onnxruntime_caches import Cache


class Call:
    """A binding for one shape of step.

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
        for cache in caches:
            cache.bind(self.binding)
        for name in watched:
            self.binding.bind_output(name)

    def bind_inputs(self) -> None:
        """Bind the small inputs, which live on the CPU."""
        for name, value in self._inputs.items():
            self.binding.bind_ortvalue_input(name, value)
