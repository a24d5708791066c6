"""The steps of the suite in their order: what each does, how long it may take, what it waits for.

Nothing is imported here that a bare machine could lack.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step of the suite.

    Attributes:
        does: in a few words.
        limit: seconds after which its process is ended; what it had found by then is kept.
        alone: it measures time, or others need what it leaves behind.
        by_default: it runs without being named.
    """

    does: str
    limit: float
    alone: bool = False
    by_default: bool = True


PLAN: dict[str, Step] = {
    "build": Step("build kernels, operators, plugin and harness for this GPU", 300, alone=True),
    "graph_capture": Step("every stream, each launch captured in a CUDA graph and replayed", 240),
    "correctness": Step("every stream against float64", 240),
    "hopper_kernel": Step("every stream by the kernel of compute capability 9.0, and without", 300),
    "tall_kernel": Step("every stream of 16 bits with warps of 32 query rows", 240),
    "last_block": Step("every 16-bit stream, splits combined by the block that ends last", 240),
    "int8_rings": Step("every stream over rings of int8, plain and captured", 300),
    "repeatability": Step("layers of full size many times: no bit may change", 240),
    "layers": Step("layers without a wait between them: every bit as one by one", 240),
    "harness": Step("the TensorRT plugin's whole life, with real enqueue", 240),
    "onnxruntime": Step("the operator in onnxruntime-gpu: function body and kernels", 240),
    "timing": Step("every workload of the targets, contestants interleaved", 480, alone=True),
    "choices": Step("every number of splits, each variant of the kernels off", 240, alone=True),
    "kernel_times": Step("each kernel of a step by itself, by the profiler", 120, alone=True),
    "counters": Step("hardware counters of single kernels, by Nsight Compute", 240, alone=True),
    "tensorrt_rtx": Step("a TensorRT-RTX engine of the demo model", 240, alone=True),
    "sanitizer": Step("a few streams under compute-sanitizer", 570, alone=True, by_default=False),
}
BY_DEFAULT = tuple(name for name, step in PLAN.items() if step.by_default)


def groups(names: list[str]) -> list[list[str]]:
    """Return the steps in their order, those together that may run side by side."""
    found: list[list[str]] = []
    for name in (n for n in PLAN if n in names):
        beside = found and not PLAN[name].alone and not PLAN[found[-1][0]].alone
        if beside:
            found[-1].append(name)
        else:
            found.append([name])
    return found
