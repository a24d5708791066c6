"""Layers one behind the other, as a model has them: what one leaves under way harms no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from scripts.gpu import timings, workloads
from scripts.gpu.kernel_library import CHOSEN_BY_PLAN, Choices, KernelLibrary
from scripts.gpu.suite import Suite

LAYERS, LAYERS_WHEN_QUICK = 24, 3
LAST_BLOCK = "last block combines"
VARIANTS = {
    "as planned": CHOSEN_BY_PLAN,
    "append kernel": Choices(appends_in_decode=False),
    LAST_BLOCK: CHOSEN_BY_PLAN,
}


def layers(suite: Suite) -> dict[str, Any]:
    """Layers without a wait between them, plain and in one graph: every bit as one by one.

    They share one workspace, and one set of counters, as the layers of a model do.
    """
    library, changed = suite.kernels(), []
    count = LAYERS_WHEN_QUICK if suite.quick else LAYERS
    chosen = [replace(workloads.small_workload(), window_size=512)] if suite.quick else _workloads()
    for workload in chosen:
        for name in VARIANTS if workload.steps == 1 else ("as planned",):
            changed += [
                f"{workload.name}, {name}, {how}"
                for how in _changed(library, suite.device, workload, name, count)
            ]
        if not suite.emulate:
            torch.cuda.empty_cache()
        suite.keep({"changed": changed})
    status = "failed" if changed else "ok"
    return {"status": status, "layers": count, "workloads": len(chosen), "changed": changed}


def _workloads() -> list[workloads.Workload]:
    return [w for w in workloads.workloads() if w.batch <= 8 and "Llama-3" in w.name]


def _changed(
    library: KernelLibrary, device: Any, workload: workloads.Workload, variant: str, count: int
) -> list[str]:
    calls = [timings.call_of(workload, device.name) for _ in range(count)]
    outputs = [made[2][0] for made in calls]
    params = calls[0][0]
    choices = VARIANTS[variant]
    if variant == LAST_BLOCK:
        choices = replace(choices, arrivals=library.arrivals(params, device.name))
    workspace = torch.empty(library.workspace_size(params) // 4, device=device.name)

    def work(wait: Callable[[], None] = lambda: None) -> None:
        for made in calls:
            library.launch(made[0], workspace, device.stream(), choices)
            wait()

    def poison() -> None:
        for tensor in (*outputs, workspace):
            tensor.fill_(float("nan"))

    poison()
    work(device.synchronize)
    wanted = [x.clone() for x in outputs]
    replayed = device.prepared(work)
    changed = []
    for how, run in (("plain", work), ("in a graph", replayed)):
        poison()
        device.synchronize()
        run()
        device.synchronize()
        if not all(map(torch.equal, wanted, outputs)):  # NaN differs from itself, too
            changed.append(how)
    return changed
