"""Kernel timings: every contestant on the same bounded keys, interleaved, out of cache.

Each contestant works through as many copies of its layer as exceed the second-level cache four
times, in one CUDA graph, so that keys come from memory as they do between the layers of a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lminf_export.operator.reference_int8 import quantize
from lminf_export.operator.settings import ring_capacity
from scripts.gpu.kernel_library import (
    CHOSEN_BY_PLAN,
    Choices,
    KernelLibrary,
    Params,
    params_of,
)
from scripts.gpu.suite import in_words
from scripts.gpu.workloads import Workload
from scripts.gpu.yardsticks import COPY, FULL, Maker, yardsticks

ROUNDS = 7
OURS = "lambda kernels"
HOPPER = "lambda kernels, those of compute capability 9.0"
TALL = "lambda kernels, 32 rows a warp"
INT8 = "lambda kernels, rings of int8"
SPLITS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 22, 33, 43, 64)
SPLITS_IN_LAST_BLOCK = (2, 4, 8, 16, 33)


class TimingDevice(Protocol):
    """A device that work can be timed on."""

    name: str
    multiprocessors: int
    shared_bytes: int
    cache_bytes: int
    hopper: bool

    def stream(self) -> int:
        """Return the stream to enqueue on."""

    def prepared(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return the work in the form in which it is timed."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the time of one call."""

    def joules(self, work: Callable[[], None]) -> float | None:
        """Return the energy of one call, None where nothing counts it."""


@dataclass(frozen=True)
class Layers:
    """As many layers as leave the cache; contestants that take the same inputs share them.

    Attributes:
        calls: of each layer.
        held: the tensors that the calls point to.
        workspace: for all of them, in turn.
    """

    calls: list[Params]
    held: list[Any]
    workspace: Tensor

    @staticmethod
    def of(library: KernelLibrary, device: TimingDevice, w: Workload, copies: int) -> Layers:
        """Make that many layers of a workload on full rings."""
        made = [call_of(w, device.name) for _ in range(copies)]
        size = library.workspace_size(made[0][0])
        workspace = torch.empty(size, dtype=torch.uint8, device=device.name)
        return Layers([params for params, *_ in made], [held for _, *held in made], workspace)

    def work(
        self, library: KernelLibrary, device: TimingDevice, choices: Choices = CHOSEN_BY_PLAN
    ) -> Callable[[], None]:
        """Return what launches all of them."""

        def launch_all() -> None:
            for params in self.calls:
                library.launch(params, self.workspace, device.stream(), choices)

        return launch_all


def measure(library: KernelLibrary, device: TimingDevice, workload: Workload) -> dict[str, Any]:
    """Time one workload.

    Args:
        library: the kernels.
        device: where they run.
        workload: what to run.

    Returns:
        Seconds of one layer (median, smallest, largest of the rounds) for every contestant, what
        follows from them, and joules of one layer where the device counts them; a contestant that
        failed has its error instead.
    """
    copies = copies_of(device, workload)
    made = cache(lambda: Layers.of(library, device, workload, copies))
    hopper = device.hopper and library.has_hopper
    of_device, tall = (KernelLibrary(library.path, name) for name in ("by_device", "tall"))
    rounded = replace(workload, int8_rings=True)
    makers: dict[str, Maker] = {
        OURS: lambda: made().work(library, device),
        **({HOPPER: lambda: made().work(of_device, device)} if hopper else {}),
        **({TALL: lambda: made().work(tall, device)} if workload.steps > 1 else {}),
        INT8: lambda: Layers.of(library, device, rounded, copies).work(library, device),
        **yardsticks(device.name, workload, copies),
    }
    works, failures = _prepared(device, makers)
    layers = {name: 1 if name == FULL else copies for name in works}
    times = _interleaved(device, works, layers)
    result = {"workload": workload.name, **_summary(workload, times), "failed": failures}
    joules = {name: device.joules(work) for name, work in works.items()}
    energy = {name: j / layers[name] for name, j in joules.items() if j is not None}
    return {**result, "joules": energy} if energy else result


def measure_choices(
    library: KernelLibrary, device: TimingDevice, workload: Workload
) -> dict[str, Any]:
    """Time the kernels with every number of splits and with each of their variants turned over.

    Returns:
        Median seconds of one layer by choice, and how many splits the plan takes.
    """
    copies = copies_of(device, workload)
    made = Layers.of(library, device, workload, copies)
    params, size = made.calls[0], made.workspace.numel()
    row = workload.batch * workload.heads * workload.steps * (workload.head_dim + 2) * 4
    choices = {
        "chosen": CHOSEN_BY_PLAN,
        "no early start": Choices(starts_early=False),
        "append kernel": Choices(appends_in_decode=False),
        "append kernel, no early start": Choices(starts_early=False, appends_in_decode=False),
        **{f"{n} splits": Choices(splits=n) for n in SPLITS if n * row <= size},
    }
    if workload.steps == 1:
        choices |= {
            f"{n} splits, combined in the last block": Choices(
                splits=n, arrivals=library.arrivals(params, device.name)
            )
            for n in SPLITS_IN_LAST_BLOCK
            if n * row <= size
        }
    works, failures = _prepared(
        device,
        {
            name: lambda choice=choice: made.work(library, device, choice)
            for name, choice in choices.items()
        },
    )
    times = _interleaved(device, works, dict.fromkeys(works, copies))
    plan = library.plan(
        params, device.multiprocessors, device.shared_bytes, size, hopper=device.hopper
    )
    return {
        "workload": workload.name,
        "kernel": plan.kernel,
        "planned_splits": plan.splits,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "failed": failures,
    }


def _prepared(
    device: TimingDevice, makers: dict[str, Maker]
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Make every contestant; those that cannot be made are left out and named."""
    works, failures = {}, {}
    for name, make in makers.items():
        try:
            works[name] = device.prepared(make())
        except Exception as error:  # noqa: BLE001 - whatever a contestant's library raises
            failures[name] = in_words(error)
    return works, failures


def _interleaved(
    device: TimingDevice, works: dict[str, Callable[[], None]], layers: dict[str, int]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name].append(device.seconds(work) / layers[name])
    return times


def our_work(
    library: KernelLibrary, device: TimingDevice, workload: Workload
) -> tuple[Callable[[], None], int]:
    """Return the kernels' work on as many layers as it takes to leave the cache, and how many."""
    copies = copies_of(device, workload)
    return Layers.of(library, device, workload, copies).work(library, device), copies


def copies_of(device: TimingDevice, workload: Workload) -> int:
    """Return how many layers exceed the cache four times."""
    return max(1, -(-4 * device.cache_bytes // workload.key_bytes))


def _summary(workload: Workload, times: dict[str, list[float]]) -> dict[str, Any]:
    seconds = {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }
    median = {name: s["median"] for name, s in seconds.items()}
    ours = median[OURS]
    result: dict[str, Any] = {
        "seconds": seconds,
        "read_bytes_per_second": workload.key_bytes / ours,
        "flops_per_second": workload.flops / ours,
    }
    if COPY in median:  # a copy reads and writes
        result["copy_bytes_per_second"] = 2 * workload.key_bytes / median[COPY]
        result["of_copy_bandwidth"] = (
            result["read_bytes_per_second"] / result["copy_bytes_per_second"]
        )
    for name, value in median.items():
        if name not in (OURS, COPY):
            result.setdefault("times_faster_than", {})[name] = value / ours
    return result


def call_of(w: Workload, device: str) -> tuple[Params, list[Tensor], list[Tensor]]:
    """One step on a full ring: params, and the inputs and outputs that must outlive them."""
    capacity = ring_capacity(w.window_size, w.steps)
    position = 10**6 // capacity * capacity  # whole laps: every slot is full
    inputs, outputs = operator_tensors(w, capacity, position, device)
    attributes = {
        "num_sink_tokens": w.num_sink_tokens, "window_size": w.window_size,
        "distance_limit": w.window_size, "scale": w.head_dim**-0.5, "softcap": 0.0,
        "rotary_dim": w.head_dim, "rotary_interleaved": False,
    }  # fmt: skip
    return params_of(inputs, outputs, attributes), inputs, outputs


def operator_tensors(
    w: Workload, capacity: int, position: int, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs of one step at a position, with caches in place."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=w.dtype, device=device)

    def angles(*shape: int) -> tuple[Tensor, Tensor]:
        angle = torch.rand(shape, device=device) * 6
        return angle.cos(), angle.sin()

    new = [random(w.batch, h, w.steps, w.head_dim) for h in (w.heads, w.kv_heads, w.kv_heads)]
    ring = [random(w.batch, w.kv_heads, capacity, w.head_dim) for _ in range(2)]
    scales: list[Tensor] = []
    if w.int8_rings:
        rounded = [quantize(x) for x in ring]
        ring, scales = [q for q, _ in rounded], [scale for _, scale in rounded]
    slots = max(w.num_sink_tokens, 1)
    sinks = [random(w.batch, w.kv_heads, slots, w.head_dim) for _ in range(2)]
    past = torch.full((w.batch,), position, device=device)
    count = torch.full((w.batch,), w.steps, device=device)
    queries = past[:, None] + torch.arange(w.steps, device=device)
    held = torch.zeros(w.batch, 1, dtype=torch.int64, device=device)  # follows from lengths; unread
    rows = angles(w.batch, w.steps, w.head_dim // 2)
    limit = angles(w.head_dim // 2)
    slopes = torch.zeros(w.heads, device=device)
    learned = torch.full((w.heads,), float("-inf"), device=device)
    lengths = [past, count, queries, held]
    inputs = [*new, *ring, *sinks, *lengths, *rows, *limit, slopes, learned, *scales]
    return inputs, [torch.empty_like(new[0]), *ring, *sinks, *scales]
