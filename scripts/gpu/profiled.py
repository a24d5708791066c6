"""One workload's kernels and nothing else, for a profiler to look at.

ncu … python -m scripts.gpu.profiled "decode Llama-3-8B B=1" --library liblminf_kernels.so
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from scripts.gpu.cuda_device import CudaDevice
from scripts.gpu.kernel_library import KernelLibrary
from scripts.gpu.timings import our_work
from scripts.gpu.workloads import workloads

PASSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    by_name = {workload.name: workload for workload in workloads()}
    parser.add_argument("workload", choices=by_name)
    parser.add_argument("--library", type=Path, required=True)
    options = parser.parse_args()
    library = KernelLibrary(options.library)
    work, _layers = our_work(library, CudaDevice.current(), by_name[options.workload])
    for _ in range(PASSES):
        work()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
