"""Steps that run the kernels: against float64, many times over, and by the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scripts.gpu import streams, timings, workloads
from scripts.gpu.check import Stream, run_stream
from scripts.gpu.kernel_library import Choices, KernelLibrary, Params
from scripts.gpu.suite import DeviceLost, SkipStep, Suite, in_words

LARGEST_RATIO = 2.0  # error in units of torch's in the same precision
REPEATS = 20
LONG_WINDOW = 1000  # the plan splits its keys


def correctness(suite: Suite, enqueue: Callable[..., None] | None = None) -> dict[str, Any]:
    """Run every stream against float64 and report the worst ratio to torch's own error."""
    return _run_all(suite, list(all_streams(suite.quick)), enqueue)


def int8_rings(suite: Suite) -> dict[str, Any]:
    """The same streams over rings of int8, and on a GPU each launch captured in a CUDA graph."""
    chosen = [replace(stream, int8_rings=True) for stream in all_streams(suite.quick)]
    result = _run_all(suite, chosen, None)
    if not suite.emulate:
        from scripts.gpu.cuda_device import launch_in_graph

        captured = _run_all(suite, chosen, launch_in_graph)
        result["captured"] = captured
        if captured["status"] == "failed":
            result["status"] = "failed"
    return result


def graph_capture(suite: Suite) -> dict[str, Any]:
    """The same streams, every launch captured in a CUDA graph and replayed."""
    if suite.emulate:
        raise SkipStep("the emulation has no CUDA graphs")
    from scripts.gpu.cuda_device import launch_in_graph

    return correctness(suite, launch_in_graph)


def last_block(suite: Suite) -> dict[str, Any]:
    """The 16-bit streams in splits that the block of decode that ends last combines."""
    return _run_all(suite, _half_streams(suite), combine_in_last_block)


def combine_in_last_block(
    library: KernelLibrary, params: Params, workspace: Tensor | None, device: Any
) -> None:
    """Launch twice, the last block combining three splits or the plan's: an `enqueue`.

    Raises:
        RuntimeError: a launch left its counters at another number than zero.
    """
    splits = 3 if workspace is not None and params.window_size < LONG_WINDOW else 0
    arrivals = library.arrivals(params, device.name)
    for _ in range(2):
        choices = Choices(splits=splits, arrivals=arrivals)
        library.launch(params, workspace, device.stream(), choices)
        if arrivals.any():
            raise RuntimeError("a launch left counters that are not zero")


def hopper_kernel(suite: Suite) -> dict[str, Any]:
    """The kernel for compute capability 9.0 with any number of rows, and without it many."""
    library = suite.kernels()
    if not suite.runs_hopper():
        raise SkipStep("the device is not of compute capability 9.0, or nvcc is older than 12.0")
    result: dict[str, Any] = {}
    for preference in ("hopper", "portable"):
        chosen = list(all_streams(suite.quick))
        result[preference] = _run_all(suite, chosen, None, KernelLibrary(library.path, preference))
        suite.keep(result)
    failed = any(part["status"] == "failed" for part in result.values())
    return {"status": "failed" if failed else "ok", **result}


def tall_kernel(suite: Suite) -> dict[str, Any]:
    """The streams in types of 16 bits with warps of 32 query rows, where the layer allows it."""
    chosen = _half_streams(suite)
    if not suite.quick:
        others = tuple(set(streams.TALL_HEAD_DIMS) - set(streams.HOPPER_HEAD_DIMS))
        chosen += [x for dtype in streams.HALF_TYPES for x in streams.tile_streams(dtype, others)]
    return _run_all(suite, chosen, None, KernelLibrary(suite.kernels().path, "tall"))


def _run_all(
    suite: Suite,
    chosen: list[Stream],
    enqueue: Callable[..., None] | None,
    library: KernelLibrary | None = None,
) -> dict[str, Any]:
    library = library or suite.kernels()
    worst, failures, kernels = 0.0, [], set()
    for number, stream in enumerate(chosen):
        try:
            outcome = run_stream(library, suite.device, stream, enqueue)
        except (RuntimeError, ValueError, LookupError) as error:
            failures.append({"stream": stream.name, "error": in_words(error)})
            if _is_lost(suite):
                failures.append(
                    {"not run": len(chosen) - number - 1, "error": "the device is lost"}
                )
                break
            continue
        worst = max(worst, outcome.ratio)
        kernels |= outcome.kernels
        if outcome.problems or not outcome.ratio <= LARGEST_RATIO:
            failures.append(
                {"stream": stream.name, "ratio": outcome.ratio, "problems": outcome.problems}
            )
    return {
        "status": "failed" if failures else "ok",
        "streams": len(chosen),
        "kernels": sorted(kernels),
        "largest_error_in_units_of_torchs": worst,
        "failures": failures,
    }


def _is_lost(suite: Suite) -> bool:
    try:
        suite.check_device()
    except DeviceLost:
        return True
    return False


def _half_streams(suite: Suite) -> list[Stream]:
    return [stream for stream in all_streams(suite.quick) if stream.dtype in streams.HALF_TYPES]


def all_streams(quick: bool) -> Iterable[Stream]:
    """Every stream of every type, or a few of each."""
    for dtype in (torch.float32, *streams.HALF_TYPES):
        found = [
            *streams.feature_streams(dtype),
            *streams.shape_streams(dtype),
            *streams.lap_streams(dtype),
            *streams.long_streams(dtype),
            *streams.tile_streams(dtype),
        ]
        yield from found[::17] if quick else found


def repeatability(suite: Suite) -> dict[str, Any]:
    """Layers of full size many times over: no order of sums depends on time, so no bit may.

    By the kernel that runs if nobody asks, and by each other one that a preference takes.
    """
    chosen = [workloads.small_workload()] if suite.quick else _layers_to_repeat()
    layers, changed = 0, []
    for workload in chosen:
        params, _inputs, outputs = timings.call_of(workload, suite.device.name)
        for which, kernels in _kernels_for(suite, params).items():
            layers += 1
            if _changes(kernels, suite.device, params, outputs):
                changed.append(workload.name + which)
    status = "failed" if changed else "ok"
    return {"status": status, "layers": layers, "repeats": REPEATS, "changed": changed}


def _kernels_for(suite: Suite, params: Params) -> dict[str, KernelLibrary]:
    """The library with each preference that takes another kernel than those before it."""
    library, device = suite.kernels(), suite.device
    found, seen = {}, set()
    for name, which in (("", library.preference), (", hopper", "hopper"), (", tall", "tall")):
        kernels = library if not name else KernelLibrary(library.path, which)
        limits = device.multiprocessors, device.shared_bytes, kernels.workspace_size(params)
        kernel = kernels.plan(params, *limits, hopper=device.hopper).kernel
        if kernel not in seen:
            found[name] = kernels
        seen.add(kernel)
    return found


def _changes(library: KernelLibrary, device: Any, params: Params, outputs: list[Tensor]) -> bool:
    size = library.workspace_size(params) // 4
    workspace = torch.empty(size, dtype=torch.float32, device=device.name)
    first: list[Tensor] = []
    for _ in range(REPEATS):
        for scratch in (outputs[0], workspace):
            scratch.fill_(float("nan"))
        library.launch(params, workspace, device.stream())
        device.synchronize()
        first = first or [x.clone() for x in outputs]
        if not all(map(torch.equal, first, outputs)):  # NaN differs from itself, too
            return True
    return False


def _layers_to_repeat() -> list[workloads.Workload]:
    layers = [w for w in workloads.workloads() if w.batch <= 8]
    return [
        replace(w, name=f"{w.name}, head_dim {head_dim}, {dtype}", head_dim=head_dim, dtype=dtype)
        for w in layers
        for head_dim in (80, 128, 256)
        for dtype in streams.HALF_TYPES
    ]


def timing(suite: Suite) -> dict[str, Any]:
    """Every workload of the targets, contestants interleaved."""
    return _each_workload(suite, timings.measure)


def choices(suite: Suite) -> dict[str, Any]:
    """The kernels with every number of splits, and with each variant switched off."""
    return _each_workload(suite, timings.measure_choices)


def _each_workload(suite: Suite, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    chosen = [workloads.small_workload()] if suite.quick else workloads.workloads()
    library, results, failed = suite.kernels(), [], []
    for workload in chosen:
        try:
            results.append(measure(library, suite.device, workload))
        except (RuntimeError, ValueError, LookupError) as error:
            failed.append({"workload": workload.name, "error": in_words(error)})
        if _is_lost(suite):
            failed.append({"workload": workload.name, "error": "the device is lost after it"})
            break
        if not suite.emulate:
            torch.cuda.empty_cache()
        suite.keep({"workloads": results, "failures": failed})
    status = "failed" if failed else "ok"
    return {"status": status, "workloads": results, "failures": failed}


def kernel_times(suite: Suite) -> dict[str, Any]:
    """Each kernel of a step by itself, as the profiler sees it, keys out of cache."""
    if suite.emulate:
        raise SkipStep("the emulation's kernels have no times")
    from scripts.gpu.cuda_device import kernel_seconds

    library, results = suite.kernels(), {}
    chosen = [workloads.small_workload()] if suite.quick else workloads.workloads()
    for workload in chosen:
        work, copies = timings.our_work(library, suite.device, workload)
        results[workload.name] = kernel_seconds(work, copies)
        del work
        torch.cuda.empty_cache()
        suite.keep({"kernels": results})
    return {"status": "ok", "kernels": results}
