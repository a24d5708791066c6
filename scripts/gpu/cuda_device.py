"""A CUDA device as the checks and timings see it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.gpu.kernel_library import KernelLibrary, Params

ENERGY_SECONDS = 0.25  # the counter moves every 20 to 100 ms


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
        side.wait_stream(torch.cuda.current_stream())  # lengths and counters are filled there
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()

        def replay(held: Callable[[], None] = work) -> None:
            graph.replay()  # reads and writes what `held` holds

        return replay

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

    def joules(self, work: Callable[[], None]) -> float | None:
        """Return the energy of one call, over a quarter of a second of them."""
        counter = _energy_counter()
        if counter is None:
            return None
        calls = max(1, round(ENERGY_SECONDS / self.seconds(work)))
        torch.cuda.synchronize()
        before = counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        return (counter() - before) / calls


def _energy_counter() -> Callable[[], float] | None:
    """Return what reads the device's energy since it started, in joules, if it has such a counter.

    The device is found by its identity, since NVML and CUDA may number devices differently.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def kernel_seconds(work: Callable[[], None], calls: int) -> dict[str, dict[str, float]]:
    """Return what each kernel of a piece of work takes on the device.

    Args:
        work: enqueues everything.
        calls: how often it runs the step that is looked at.

    Returns:
        Seconds and launches of one step by the kernel's name.
    """
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return {
        event.key: {
            "seconds": event.device_time_total / 1e6 / calls,
            "launches": event.count / calls,
        }
        for event in found.key_averages()
        if event.device_time_total
    }


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
