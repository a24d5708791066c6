"""Steps on a GPU in onnxruntime: one copy in, one copy out, single tokens from CUDA graphs."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import mmap
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from lminf_export.operator import bindings
from lminf_export.runtime.onnxruntime_caches import Cache
from lminf_export.runtime.onnxruntime_call import bind_others

logger = logging.getLogger(__name__)

NAME = "CUDAExecutionProvider"
# A captured graph stays until the session ends: onnxruntime has no call that gives one back.
MOST_GRAPHS = 256
NAME_OF_DEVICE = "cuda"
_SMALL = (bindings.INPUT_IDS, bindings.PAST_LENGTH, bindings.NEW_LENGTH, bindings.LOGITS_INDEX)
_ALIGNMENT = 256
_GRAPH_ID = "gpu_graph_id"
_NOT_CAPTURED = "-1"
_CUDA_SUCCESS, _TO_HOST = 0, 2  # of cudaError and cudaMemcpyKind
_WHAT_IS_CAPTURED = (1, 1)  # S and K of a single token


def provider_options(*, graphs: bool) -> dict[str, str]:
    """Return what the CUDA provider is told: float32 stays float32, and whether to capture."""
    return {"use_tf32": "0", "enable_cuda_graph": "1" if graphs else "0"}


def preload_libraries() -> None:
    """Load CUDA's libraries from NVIDIA's Python packages, where they are installed.

    Without it the provider finds them only on the loader's path, or after torch was imported.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        ort.preload_dlls()
    for line in said.getvalue().splitlines():
        logger.debug("onnxruntime's CUDA libraries: %s", line)


class CudaGraphs:
    """Whether single tokens of a session are played from CUDA graphs, one for each state.

    Args:
        reason: why not; None where they are.

    Attributes:
        reason: why not, as it stands.
        lock: held during a run where graphs are captured: onnxruntime takes one at a time then.
    """

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        self.lock: contextlib.AbstractContextManager[object] = (
            threading.Lock() if reason is None else contextlib.nullcontext()
        )
        self._taken = 0

    @property
    def description(self) -> str:
        """yes, or no and why, for logs and reports."""
        return "yes" if self.reason is None else f"no, because {self.reason}"

    def run_options(self, width: int, count: int) -> ort.RunOptions | None:
        """Return the options of all runs of one call; None for onnxruntime's own.

        Args:
            width: S.
            count: K.
        """
        if self.reason is not None and self._taken == 0:
            return None
        options = ort.RunOptions()
        graph = _NOT_CAPTURED
        if self.reason is None and (width, count) == _WHAT_IS_CAPTURED:
            self._taken += 1
            graph = str(self._taken)
            if self._taken == MOST_GRAPHS:
                self.reason = f"{MOST_GRAPHS} states of this session have one; later ones have none"
                logger.warning("CUDA graph: %s", self.description)
        options.add_run_config_entry(_GRAPH_ID, graph)
        return options


class LockedCopy:
    """Memory that the GPU writes to directly: onnxruntime's own copies take several times as long.

    Args:
        array: where the content goes, C-contiguous.
        cudart: CUDA's runtime library, the one that onnxruntime has loaded.
    """

    def __init__(self, array: np.ndarray, cudart: ctypes.CDLL) -> None:
        self._array, self._cudart = array, cudart

    @classmethod
    def like(cls, array: np.ndarray) -> LockedCopy | None:
        """Lock pages for such an array; None where CUDA's runtime is not found or does not."""
        pages = mmap.mmap(-1, array.nbytes)  # of its own: a page can be locked once
        array = np.frombuffer(pages, array.dtype).reshape(array.shape)
        name = f"libcudart.so.{str(getattr(ort, 'cuda_version', '')).partition('.')[0]}"
        try:
            cudart = ctypes.CDLL(name)
            status = cudart.cudaHostRegister(_pointer(array.ctypes.data), _size(array), 0)
        except (OSError, AttributeError) as error:
            logger.debug("logits are copied by onnxruntime: %s", error)
            return None
        if status != _CUDA_SUCCESS:
            cudart.cudaGetLastError()  # or onnxruntime would find this error at its next kernel
            logger.debug("logits are copied by onnxruntime: cudaHostRegister failed: %d", status)
            return None
        copy = cls(array, cudart)
        weakref.finalize(copy, _unlock, cudart, array)
        return copy

    def read(self, address: int) -> np.ndarray:
        """Copy from an address on the GPU, which nothing writes to any more.

        Raises:
            RuntimeError: CUDA refuses.
        """
        status = self._cudart.cudaMemcpy(
            _pointer(self._array.ctypes.data), _pointer(address), _size(self._array), _TO_HOST
        )
        if status != _CUDA_SUCCESS:
            raise RuntimeError(f"cudaMemcpy of the logits failed: error {status}")
        return self._array


def _unlock(cudart: ctypes.CDLL, array: np.ndarray) -> None:
    cudart.cudaHostUnregister(_pointer(array.ctypes.data))


_pointer = ctypes.c_void_p


def _size(array: np.ndarray) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


class CudaCall:
    """A binding to a GPU's memory, with fixed addresses, as a captured graph needs them.

    Args:
        session: onnxruntime's.
        graphs: of the session.
        past_length: (B,) int64, read at every run.
        caches: bound to past and present.
        width: S.
        count: K.
        vocab_size: V.
        watched: outputs of the graph behind those of the contract.
        device: where the memory is, in onnxruntime's words.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        graphs: CudaGraphs,
        past_length: np.ndarray,
        caches: Sequence[Cache],
        width: int,
        count: int,
        vocab_size: int,
        watched: Sequence[str],
        device: str = NAME_OF_DEVICE,
    ) -> None:
        batch_size = len(past_length)
        self._session, self._lock = session, graphs.lock
        self._past_length = past_length
        self.binding = session.io_binding()
        shapes = ((batch_size, width), (batch_size,), (batch_size,), (batch_size, count))
        offsets = np.cumsum([0, *(_aligned(shape) for shape in shapes)])
        self._host = np.zeros(int(offsets[-1]), np.int64)
        self._device = ort.OrtValue.ortvalue_from_numpy(self._host, device)
        self._small: list[np.ndarray] = []
        for name, shape, offset in zip(_SMALL, shapes, offsets.tolist(), strict=False):
            size = int(np.prod(shape))
            self._small.append(self._host[offset : offset + size].reshape(shape))
            address = self._device.data_ptr() + offset * self._host.itemsize
            self.binding.bind_input(name, device, 0, np.int64, shape, address)
        logits = np.zeros((batch_size, count, vocab_size), np.float32)
        # No rows, no memory that a GPU would give.
        self._logits = ort.OrtValue.ortvalue_from_numpy(logits, *([device] if logits.size else []))
        on_gpu = device == NAME_OF_DEVICE and width == 1 and logits.size > 0
        self._locked = LockedCopy.like(logits) if on_gpu else None
        self.binding.bind_ortvalue_output(bindings.LOGITS, self._logits)
        bind_others(self.binding, caches, watched)
        self._options = graphs.run_options(width, count)

    def run(
        self, input_ids: np.ndarray, new_length: np.ndarray, logits_index: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """See `Call.run`."""
        values = (input_ids, self._past_length, new_length, logits_index)
        for place, value in zip(self._small, values, strict=True):
            np.copyto(place, value)
        start = time.perf_counter()
        with self._lock:
            self._device.update_inplace(self._host)
            self._session.run_with_iobinding(self.binding, self._options)
            logits: np.ndarray
            if self._locked is None:
                logits = self._logits.numpy()
            else:
                logits = self._locked.read(self._logits.data_ptr())
        return logits, time.perf_counter() - start


def _aligned(shape: tuple[int, ...]) -> int:
    """Return the int64 elements from an input to the next one."""
    step = _ALIGNMENT // 8
    return -(-int(np.prod(shape)) // step) * step
