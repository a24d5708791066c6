"""Runs one stream through a broken library, in a process of its own: the emulation may end it.

python -m tests.support.broken_kernel LIBRARY

Exit code 0: nothing was noticed; FOUND: wrong numbers; SIGABRT: the emulation said what is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.gpu import streams
from scripts.gpu.check import Stream, run_stream
from scripts.gpu.emulated_device import EmulatedDevice
from scripts.gpu.kernel_library import KernelLibrary

FOUND = 17
HOPPER = EmulatedDevice(shared_bytes=232448, hopper=True)


def hopper_stream() -> Stream:
    """Several tiles of sinks and ring, more than the stages, two blocks a key/value head."""
    case = streams.SMALL.with_(
        window_size=601, chunk_size=67, num_sink_tokens=139, num_heads=2, num_kv_heads=1
    )
    return Stream("hopper", case, (10**6,), ((67,), (65,)))


def main(path: str, largest_ratio: float = 2.0) -> int:
    library = KernelLibrary(Path(path), "by_device")
    for eager in (True, False):
        HOPPER.configure(library, eager=eager)
        outcome = run_stream(library, HOPPER, hopper_stream())
        assert outcome.kernels == {"tiles_hopper"}
        if outcome.problems or outcome.ratio > largest_ratio:
            return FOUND
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
