"""Cache tensors of a state in onnxruntime: main memory shared with arrays, or a GPU's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import onnxruntime as ort

from lminf_export.operator.bindings import TensorSpec
from lminf_export.runtime.options import Provider
from lminf_export.runtime.snapshot_memory import numpy_dtype

_ONNX_BFLOAT16 = 16


class Cache(ABC):
    """One cache tensor (B, G, slots, D), or scales (B, G, slots, 1); past and present share it.

    Attributes:
        past: name of the graph's input.
        present: name of the graph's output.
    """

    def __init__(self, past: str, present: str) -> None:
        self.past, self.present = past, present

    @abstractmethod
    def bind(self, binding: ort.IOBinding) -> None:
        """Bind the memory to input and output."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Cache:
        """Return the cache of some streams, in the same memory."""

    @abstractmethod
    def content(self) -> np.ndarray:
        """Return the content: the memory itself, or a copy of a GPU's."""

    @abstractmethod
    def write(self, content: np.ndarray) -> None:
        """Replace the first slots; the others become zeros."""

    def clear(self) -> None:
        """Set the content to zeros."""
        self.write(self.content()[:, :, :0])


class SharedCache(Cache):
    """A cache in main memory.

    Attributes:
        array: of the cache's shape and type: the memory itself.
        value: what is bound.
    """

    def __init__(self, past: str, present: str, array: np.ndarray) -> None:
        super().__init__(past, present)
        self.array = array
        self.value = ort.OrtValue.ortvalue_from_numpy(array)

    def bind(self, binding: ort.IOBinding) -> None:
        """See `Cache.bind`."""
        binding.bind_ortvalue_input(self.past, self.value)
        binding.bind_ortvalue_output(self.present, self.value)

    def rows(self, start: int, stop: int) -> SharedCache:
        """See `Cache.rows`."""
        return SharedCache(self.past, self.present, self.array[start:stop])

    def content(self) -> np.ndarray:
        """See `Cache.content`; the memory itself."""
        return self.array

    def write(self, content: np.ndarray) -> None:
        """See `Cache.write`."""
        slots = content.shape[2]
        self.array[:, :, :slots], self.array[:, :, slots:] = content, 0


class DeviceCache(Cache):
    """A cache in a GPU's memory: all of a tensor, or a view of some of its streams.

    onnxruntime copies whole tensors only, so a view reads and writes its parent's. Elements of
    bfloat16, which NumPy lacks, are held as uint16 and bound as what they are.
    """

    def __init__(
        self, spec: TensorSpec, present: str, value: Any, shape: tuple[int, ...], start: int = 0
    ) -> None:
        super().__init__(spec.name, present)
        self._spec, self._value, self._shape, self._start = spec, value, shape, start

    @classmethod
    def zeros(
        cls, spec: TensorSpec, present: str, shape: tuple[int, ...], provider: Provider
    ) -> DeviceCache:
        """Return a cache of zeros; in main memory there is one such tensor at a time."""
        content = np.zeros(shape, numpy_dtype(spec.dtype))
        return cls(spec, present, ort.OrtValue.ortvalue_from_numpy(content, provider), shape)

    def bind(self, binding: ort.IOBinding) -> None:
        """See `Cache.bind`."""
        dtype = numpy_dtype(self._spec.dtype)
        row_bytes = int(np.prod(self._shape[1:])) * dtype.itemsize
        where = (
            self._value.device_name(),
            0,
            _ONNX_BFLOAT16 if self._spec.dtype == "bfloat16" else dtype.type,
            self._shape,
            self._value.data_ptr() + self._start * row_bytes,
        )
        binding.bind_input(self.past, *where)
        binding.bind_output(self.present, *where)

    def rows(self, start: int, stop: int) -> DeviceCache:
        """See `Cache.rows`."""
        shape = (stop - start, *self._shape[1:])
        return DeviceCache(self._spec, self.present, self._value, shape, self._start + start)

    def content(self) -> np.ndarray:
        """See `Cache.content`; a copy."""
        return self._whole()[self._start : self._start + self._shape[0]]

    def write(self, content: np.ndarray) -> None:
        """See `Cache.write`."""
        whole = self._whole()
        own = whole[self._start : self._start + self._shape[0]]
        slots = content.shape[2]
        own[:, :, :slots], own[:, :, slots:] = content, 0
        self._value.update_inplace(whole)

    def _whole(self) -> np.ndarray:
        whole: np.ndarray = self._value.numpy()
        return whole
