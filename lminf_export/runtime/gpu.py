"""Is there an NVIDIA GPU? Asked of the driver itself, before any library that would crash."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

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
    """

    name: str
    compute_capability: tuple[int, int]

    @property
    def target(self) -> str:
        """Its compute capability as engines name it, such as "sm_89"."""
        return f"sm_{self.compute_capability[0]}{self.compute_capability[1]}"


def find_gpu() -> Gpu | str:
    """Return the first GPU, or why there is none.

    Not yet executed on a machine with a GPU.
    """
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
    return Gpu(name.value.decode(errors="replace"), (numbers[0].value, numbers[1].value))


def _error_name(driver: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA error {status}"
