"""Runs a broken library, in a process of its own: the emulation may end it.

python -m tests.support.broken_kernel LIBRARY {hopper,early}

hopper is one stream through the kernel on warpgroups; early are single tokens whose kernels start
before the one ahead has ended.

Exit code 0: nothing was noticed; FOUND: wrong numbers; SIGABRT: the emulation said what is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from scripts.gpu import streams
from scripts.gpu.check import Stream, run_stream
from scripts.gpu.emulated_device import EmulatedDevice, counters, reset_counters
from scripts.gpu.kernel_library import Choices, KernelLibrary, params_of
from tests.support.kernel_case import one_step

FOUND = 17
HOPPER = EmulatedDevice(shared_bytes=232448, hopper=True)
EARLY = Choices(splits=3, appends_in_decode=False)


def hopper_stream() -> Stream:
    """Several tiles of sinks and ring, more than the stages, two blocks a key/value head."""
    case = streams.SMALL.with_(
        window_size=601, chunk_size=67, num_sink_tokens=139, num_heads=2, num_kv_heads=1
    )
    return Stream("hopper", case, (10**6,), ((67,), (65,)))


def early_launches(library: KernelLibrary, device: EmulatedDevice, choices: Choices = EARLY) -> int:
    """Run a single token on a device; return how many of its kernels started early."""
    device.configure(library)
    case = streams.SMALL.with_(window_size=211, num_heads=4, num_kv_heads=1)
    inputs, outputs, attributes = one_step(case, (10**6,), (1,), torch.float16)
    params = params_of(inputs, outputs, attributes)
    workspace = torch.empty(library.workspace_size(params) // 4)
    reset_counters(library)
    library.launch(params, workspace, choices=choices)
    return counters(library).early_launches


def start_early(path: str) -> int:
    library = KernelLibrary(Path(path))
    for code in (90, 80):
        early_launches(library, EmulatedDevice(hopper=True, code=code))
    return 0


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
    sys.exit({"hopper": main, "early": start_early}[sys.argv[2]](sys.argv[1]))
