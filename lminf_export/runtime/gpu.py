"""The NVIDIA GPU: whether there is one, asked of the driver itself, and its memory.

Not yet executed on a machine with a GPU.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lminf_export.errors import SessionError

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# CUdevice_attribute values of the driver's stable ABI.
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU the driver shows.

    Attributes:
        name: as its maker calls it.
        compute_capability: major and minor.
        driver_cuda: the CUDA release that the driver was made for, such as 13000 for 13.0; 0 if
            it does not say.
    """

    name: str
    compute_capability: tuple[int, int]
    driver_cuda: int = 0

    @property
    def target(self) -> str:
        """Its compute capability as engines name it, such as "sm_89"."""
        return f"sm_{self.compute_capability[0]}{self.compute_capability[1]}"


def find_gpu() -> Gpu | str:
    """Return the first GPU, or why there is none; asked before any library that would crash."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return "no NVIDIA driver is installed"
    try:
        return _first_device(driver)
    except AttributeError as error:
        return f"the NVIDIA driver lacks a function: {error}"


def _first_device(driver: ctypes.CDLL) -> Gpu | str:
    status = driver.cuInit(0)
    if status:
        return f"the NVIDIA driver does not start: {_error_name(driver, status)}"
    count, device = ctypes.c_int(0), ctypes.c_int(0)
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value < 1:
        return "the NVIDIA driver shows no device"
    name = ctypes.create_string_buffer(_NAME_BYTES)
    numbers = ctypes.c_int(0), ctypes.c_int(0)
    status = driver.cuDeviceGet(ctypes.byref(device), 0)
    status = status or driver.cuDeviceGetName(name, _NAME_BYTES, device)
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        status = status or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if status:
        return f"the first device does not answer: {_error_name(driver, status)}"
    release = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(release)):
        release.value = 0
    capability = (numbers[0].value, numbers[1].value)
    return Gpu(name.value.decode(errors="replace"), capability, release.value)


def _error_name(driver: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA error {status}"


class Cuda:
    """The few calls of the CUDA runtime a session needs, and its stream.

    Args:
        cudart: `cuda.bindings.runtime`.
    """

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        (self._stream,) = self._call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)
        self._kinds = cudart.cudaMemcpyKind
        weakref.finalize(self, cudart.cudaStreamDestroy, self._stream)

    @property
    def stream(self) -> int:
        """The stream's handle as a number."""
        return int(self._stream)

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes of the GPU."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory."""
        (address,) = self._call("cudaMalloc", nbytes)
        return int(address)

    def free(self, address: int) -> None:
        """Free memory; errors are ignored, since the interpreter may be shutting down."""
        self._cudart.cudaFree(address)

    def zero(self, address: int, nbytes: int) -> None:
        """Fill memory with zeros."""
        self._call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def send(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU."""
        kind = self._kinds.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def receive(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU into a contiguous array, done after `synchronize`."""
        kind = self._kinds.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def send_rows(self, address: int, pitch: int, array: np.ndarray) -> None:
        """Copy the rows of a contiguous array (R, bytes) to the GPU, `pitch` bytes apart."""
        self._copy_rows("HostToDevice", address, pitch, array.ctypes.data, array.shape[1], array)

    def receive_rows(self, array: np.ndarray, address: int, pitch: int) -> None:
        """Copy rows that are `pitch` bytes apart into a contiguous array (R, bytes).

        It is done after `synchronize`.
        """
        self._copy_rows("DeviceToHost", array.ctypes.data, array.shape[1], address, pitch, array)

    def _copy_rows(
        self, kind: str, to: int, to_pitch: int, start: int, pitch: int, array: np.ndarray
    ) -> None:
        rows, width = array.shape
        if rows and width:
            direction = getattr(self._kinds, f"cudaMemcpy{kind}")
            self._call(
                "cudaMemcpy2DAsync", to, to_pitch, start, pitch, width, rows, direction,
                self._stream,
            )  # fmt: skip

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy memory of the GPU to another place there."""
        kind = self._kinds.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        self._call("cudaStreamSynchronize", self._stream)

    def allocate_host(self, nbytes: int) -> np.ndarray:
        """Return page-locked memory of this machine as bytes; free it with `free_host`."""
        (address,) = self._call("cudaHostAlloc", nbytes, self._cudart.cudaHostAllocDefault)
        memory = (ctypes.c_uint8 * nbytes).from_address(int(address))
        return np.ctypeslib.as_array(memory)

    def free_host(self, array: np.ndarray) -> None:
        """Free page-locked memory."""
        self._cudart.cudaFreeHost(array.ctypes.data)

    def work_memory(self, nbytes: int) -> WorkMemory:
        """Return memory that is freed with the returned object."""
        return WorkMemory(self, max(nbytes, 1))

    def record(self, work: Callable[[], None]) -> Graph:
        """Record the work that a function enqueues, without running it.

        Raises:
            SessionError: the work cannot be recorded; the stream is as before.
        """
        # Other threads may use the GPU meanwhile; this one may not.
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._call("cudaStreamBeginCapture", self._stream, mode)
            work()
        except BaseException:
            # The recording ends in any case; why it failed is known already.
            _, graph = self._cudart.cudaStreamEndCapture(self._stream)
            if graph:
                self._cudart.cudaGraphDestroy(graph)
            raise
        (graph,) = self._call("cudaStreamEndCapture", self._stream)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cudart.cudaGraphDestroy(graph)
        return Graph(self, executable)

    def launch(self, executable: Any) -> None:
        """Enqueue recorded work."""
        self._call("cudaGraphLaunch", executable, self._stream)

    def forget(self, executable: Any) -> None:
        """Destroy recorded work."""
        self._cudart.cudaGraphExecDestroy(executable)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        status, *values = getattr(self._cudart, name)(*arguments)
        if status != self._cudart.cudaError_t.cudaSuccess:
            raise SessionError(f"{name} failed: {getattr(status, 'name', status)}")
        return tuple(values)


class WorkMemory:
    """Memory on the GPU, freed with this object.

    Attributes:
        address: where it begins.
        nbytes: how large it is.
    """

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = cuda.allocate(nbytes)
        weakref.finalize(self, cuda.free, self.address)


class Graph:
    """Recorded work, which can be launched any number of times; `free` destroys it."""

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda = cuda
        self._executable = executable

    def launch(self) -> None:
        """Enqueue the work on the stream it was recorded from."""
        self._cuda.launch(self._executable)

    def free(self) -> None:
        """Destroy it."""
        self._cuda.forget(self._executable)


class Buffers:
    """Named memory of one state, on the host and on the GPU; `free` frees all of it.

    Attributes:
        graphs: recorded work that uses the memory, destroyed before it.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._held: dict[str, tuple[int, int]] = {}
        self._host: dict[str, np.ndarray] = {}
        self.graphs: list[Graph] = []

    def __getitem__(self, name: str) -> int:
        return self._held[name][0]

    def reserve(self, name: str, nbytes: int, *, zeroed: bool = False) -> int:
        """Return the address of at least this many bytes; old content may be lost."""
        address, size = self._held.get(name, (0, -1))
        if nbytes > size:
            if size >= 0:
                del self._held[name]
                self._cuda.free(address)
            address = self._cuda.allocate(nbytes)
            self._held[name] = address, nbytes
        if zeroed:
            self._cuda.zero(address, nbytes)
        return address

    def reserve_host(self, name: str, nbytes: int) -> np.ndarray:
        """Return at least this many page-locked bytes; old content may be lost."""
        array = self._host.get(name)
        if array is None or array.nbytes < nbytes:
            if array is not None:
                del self._host[name]
                self._cuda.free_host(array)
            array = self._host[name] = self._cuda.allocate_host(nbytes)
        return array

    def free(self) -> None:
        """Free all memory and destroy the recorded work."""
        while self.graphs:
            self.graphs.pop().free()
        while self._host:
            self._cuda.free_host(self._host.popitem()[1])
        while self._held:
            self._cuda.free(self._held.popitem()[1][0])
