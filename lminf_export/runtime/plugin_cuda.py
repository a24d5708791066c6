"""Which CUDA runtime a plugin's library has inside, and whether the driver runs it.

The runtime is linked in statically, so no package manager brings it together with a driver.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from lminf_export.runtime.gpu import Gpu

# How the library says it (plugins/tensorrt/cuda_version.cpp): major · 1000 + minor · 10.
_MARK = re.compile(rb"lminf_tensorrt CUDA runtime (\d+)\0")
# The oldest branch of the driver that runs programs of a major release of CUDA; within one, any
# minor release runs (NVIDIA's CUDA Compatibility guide).
_DRIVERS = {11: "R450", 12: "R525", 13: "R580"}


def cuda_runtime(path: Path) -> int | None:
    """Return the CUDA runtime inside a library, such as 13000 for 13.0, without loading it.

    Args:
        path: of the library.

    Returns:
        None if it does not say: another library, or one that was built before it did.

    Raises:
        OSError: it cannot be read.
    """
    if not path.stat().st_size:
        return None
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        found = _MARK.search(content)
        return int(found[1]) or None if found else None


def driver_problem(path: Path, gpu: Gpu) -> str | None:
    """Return why this machine's driver does not run a plugin's library, None if it does.

    Args:
        path: of the library.
        gpu: with the CUDA release that the driver was made for.
    """
    runtime = cuda_runtime(path)
    if runtime is None or not gpu.driver_cuda or gpu.driver_cuda // 1000 >= runtime // 1000:
        return None
    major = runtime // 1000
    branch = f"{_DRIVERS[major]} or later" if major in _DRIVERS else f"for CUDA {major}"
    own = gpu.driver_cuda // 1000
    return (
        f"{path.name} holds the runtime of CUDA {_text(runtime)}, which needs an NVIDIA driver "
        f"{branch}; this machine's is for CUDA {_text(gpu.driver_cuda)}: install a newer driver, "
        f"or build the plugin with CUDA {own} (docs/engines.md)"
    )


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
