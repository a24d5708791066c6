"""The block emulation as a device, for tests and for `gpu_suite.py --emulate`."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

from scripts.gpu.kernel_library import KernelLibrary


@dataclass(frozen=True)
class EmulatedDevice:
    """The CPU, as far as the launcher sees it.

    Attributes:
        multiprocessors: what the launcher is told; few of them make it split keys sooner.
        shared_bytes: shared memory of each.
        hopper: it is of compute capability 9.0.
        driver: CUDA's version of its driver, as the runtime gives it.
        code: what the kernels are compiled for; less than 90 is PTX that the driver translates.
    """

    name: str = "cpu"
    multiprocessors: int = 4
    shared_bytes: int = 101376
    hopper: bool = False
    driver: int = 13000
    code: int = 90

    def stream(self) -> int:
        """Return the stream to enqueue on; the emulation has one."""
        return 0

    def synchronize(self) -> None:
        """Do nothing: a launch returns when its kernels are done."""

    def configure(
        self, library: KernelLibrary, *, reverse: bool = False, eager: bool = False
    ) -> None:
        """Tell an emulated library its limits and the order of what has none.

        Args:
            library: the emulated kernels.
            reverse: the last warp of a block runs first.
            eager: copies that arrive at a barrier do so at once, not as late as can be.
        """
        library.c.lminfEmulationConfigure(
            *(self.multiprocessors, self.shared_bytes, int(reverse), int(self.hopper)),
            *(int(eager), self.driver, self.code),
        )


@dataclass(frozen=True)
class Counters:
    """Counters of the emulated kernels since the last reset.

    Attributes:
        launches: kernels.
        early_launches: of these, kernels that may start before the one ahead of them ends.
        streamed_bytes: keys and values loaded into registers.
        copied_bytes: keys and values copied to shared memory.
    """

    launches: int
    early_launches: int
    streamed_bytes: int
    copied_bytes: int


def reset_counters(library: KernelLibrary) -> None:
    """Set an emulated library's counters to zero."""
    library.c.lminfEmulationReset()


def counters(library: KernelLibrary) -> Counters:
    """Read an emulated library's counters."""
    numbers = (ctypes.c_uint64 * 4)()
    library.c.lminfEmulationCounters(numbers)
    return Counters(*(int(n) for n in numbers))


@dataclass(frozen=True)
class TimedEmulation(EmulatedDevice):
    """The emulation with a clock, so that the timing code runs; its times mean nothing.

    Attributes:
        cache_bytes: of a second-level cache; none.
    """

    cache_bytes: int = 0

    def prepared(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work once and return it."""
        work()
        return work

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the wall time of one call."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def joules(self, work: Callable[[], None]) -> float | None:
        """Return nothing: what a kernel would take cannot be told from this."""
        return None
