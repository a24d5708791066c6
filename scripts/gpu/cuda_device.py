"""A CUDA device as the checks and timings see it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.gpu.kernel_library import KernelLibrary, Params


@dataclass(frozen=True)
class CudaDevice:
    """The current CUDA device.

    Attributes:
        name: torch's name for it.
        multiprocessors: of the device.
        shared_bytes: shared memory of each.
        cache_bytes: second-level cache.
        hopper: it is of compute capability 9.0.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    cache_bytes: int
    hopper: bool = False

    @staticmethod
    def current() -> CudaDevice:
        """Describe the current device."""
        found = torch.cuda.get_device_properties(0)
        return CudaDevice(
            "cuda",
            found.multi_processor_count,
            found.shared_memory_per_multiprocessor,
            found.L2_cache_size,
            (found.major, found.minor) == (9, 0),
        )

    def stream(self) -> int:
        """Return torch's current stream."""
        return int(torch.cuda.current_stream().cuda_stream)

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        torch.cuda.synchronize()

    def prepared(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return the work as one CUDA graph, so that launching costs every contestant the same."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the device time of one call, the median of five."""
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


def launch_in_graph(
    library: KernelLibrary, params: Params, workspace: Tensor | None, device: CudaDevice
) -> None:
    """Capture one launch in a CUDA graph and replay it: `enqueue` of `check.run_stream`.

    Capturing runs nothing, so the outputs are still poisoned when the graph is replayed.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        library.launch(params, workspace, device.stream())
    graph.replay()
    torch.cuda.synchronize()
