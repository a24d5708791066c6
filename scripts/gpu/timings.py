"""Kernel timings: every contestant on the same bounded keys, interleaved, out of cache.

Each contestant works through as many copies of its layer as exceed the second-level cache four
times, in one CUDA graph, so that keys come from memory as they do between the layers of a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lminf_export.operator.reference_int8 import quantize
from lminf_export.operator.settings import ring_capacity
from scripts.gpu.kernel_library import KernelLibrary, Params, params_of

ROUNDS = 7
FULL_CONTEXT = 32768
INT8 = "lambda kernels, rings of int8"
PORTABLE = "lambda kernels, mma.sync"  # where compute capability 9.0 has a kernel of its own
UNSPLIT = "lambda kernels, keys not split"  # whether the planner's splits were worth it


@dataclass(frozen=True)
class Workload:
    """One attention layer and how many tokens a step brings.

    Attributes:
        name: as the table shows it.
        batch: rows.
        heads: query heads.
        kv_heads: key/value heads.
        steps: new tokens of every row.
        head_dim: D.
        window_size: W.
        num_sink_tokens: N.
        full_context: keys of the full attention compared with; 0 for none.
        dtype: of queries, keys and values.
        int8_rings: the rings hold int8.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    steps: int = 1
    head_dim: int = 128
    window_size: int = 4096
    num_sink_tokens: int = 16
    full_context: int = 0
    dtype: torch.dtype = torch.float16
    int8_rings: bool = False

    @property
    def keys(self) -> int:
        """Keys that every query sees."""
        return self.window_size + self.num_sink_tokens

    @property
    def key_bytes(self) -> int:
        """Bytes of keys and values that a step has to read."""
        visible = self.keys + self.steps - 1
        return 2 * 2 * self.batch * self.kv_heads * visible * self.head_dim

    @property
    def flops(self) -> int:
        """Operations of both products over visible pairs."""
        return 4 * self.batch * self.heads * self.steps * self.keys * self.head_dim


def workloads() -> list[Workload]:
    """Return the workloads of the project's targets: heads of Llama-2-7B and Llama-3-8B."""
    heads = {"Llama-2-7B": (32, 32), "Llama-3-8B": (32, 8)}
    decode = [
        Workload(f"decode {model} B={batch}", batch, *sizes, full_context=FULL_CONTEXT)
        for model, sizes in heads.items()
        for batch in (1, 8, 64)
    ]
    # 64 rows of 32 key heads at 32k keys take 32 GiB a layer: full attention is timed up to B = 8.
    decode = [replace(w, full_context=0) if w.batch == 64 else w for w in decode]
    chunk = [
        Workload(f"prefill {model} chunk 1024", 1, *sizes, steps=1024)
        for model, sizes in heads.items()
    ]
    return decode + chunk


def small_workload() -> Workload:
    """Something that the block emulation does in a second."""
    return Workload("small", 1, 2, 1, head_dim=64, window_size=64, full_context=128)


class TimingDevice(Protocol):
    """A device that work can be timed on."""

    name: str
    cache_bytes: int
    hopper: bool

    def stream(self) -> int:
        """Return the stream to enqueue on."""

    def prepared(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return the work in the form in which it is timed."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the time of one call."""


def measure(
    library: KernelLibrary, device: TimingDevice, workload: Workload, *, flex: bool = True
) -> dict[str, Any]:
    """Time one workload.

    Args:
        library: the kernels.
        device: where they run.
        workload: what to run.
        flex: also time compiled FlexAttention.

    Returns:
        Seconds of one layer (median, smallest, largest of the rounds) for every contestant and
        what follows from them; a contestant that failed has its error instead.
    """
    copies = max(1, -(-4 * device.cache_bytes // workload.key_bytes))
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "lambda kernels": lambda: _ours(library, device, workload, copies),
        UNSPLIT: lambda: _ours(library, device, workload, copies, split=False),
        INT8: lambda: _ours(library, device, replace(workload, int8_rings=True), copies),
        "torch SDPA, same keys": lambda: _sdpa(device, workload, workload.keys, copies),
        "copy": lambda: _copy(device, workload, copies),
    }
    if device.hopper and library.has_hopper and workload.steps > 1:
        portable = KernelLibrary(library.path, "portable")
        makers[PORTABLE] = lambda: _ours(portable, device, workload, copies)
    if flex:
        makers["compiled FlexAttention, same keys"] = lambda: _flex(device, workload, copies)
    if workload.full_context:
        makers["torch SDPA, full context"] = lambda: _sdpa(
            device, workload, workload.full_context, 1
        )
    works, failures = {}, {}
    for name, make in makers.items():
        try:
            works[name] = device.prepared(make())
        except (RuntimeError, torch.OutOfMemoryError) as error:
            failures[name] = str(error).splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            count = 1 if name.endswith("full context") else copies
            times[name].append(device.seconds(work) / count)
    return {"workload": workload.name, **_summary(workload, times), "failed": failures}


def _summary(workload: Workload, times: dict[str, list[float]]) -> dict[str, Any]:
    seconds = {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }
    median = {name: s["median"] for name, s in seconds.items()}
    ours = median["lambda kernels"]
    result: dict[str, Any] = {
        "seconds": seconds,
        "read_bytes_per_second": workload.key_bytes / ours,
        "flops_per_second": workload.flops / ours,
    }
    if "copy" in median:  # a copy reads and writes
        result["copy_bytes_per_second"] = 2 * workload.key_bytes / median["copy"]
        result["of_copy_bandwidth"] = (
            result["read_bytes_per_second"] / result["copy_bytes_per_second"]
        )
    for name, value in median.items():
        if name not in ("lambda kernels", "copy"):
            result.setdefault("times_faster_than", {})[name] = value / ours
    return result


def _ours(
    library: KernelLibrary, device: TimingDevice, w: Workload, copies: int, *, split: bool = True
) -> Callable[[], None]:
    calls, held = [], []
    for _ in range(copies):
        params, *tensors = call_of(w, device.name)
        calls.append(params)
        held.append(tensors)
    size = library.workspace_size(calls[0]) if split else 0
    workspace = torch.empty(size, dtype=torch.uint8, device=device.name)

    def work(keep: Any = held) -> None:
        for params in calls:
            library.launch(params, workspace, device.stream())

    return work


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


def _plain_tensors(device: TimingDevice, w: Workload, keys: int, copies: int) -> list[list[Tensor]]:
    def random(heads: int, length: int) -> Tensor:
        shape = (w.batch, heads, length, w.head_dim)
        return torch.randn(shape, dtype=w.dtype, device=device.name)

    return [
        [random(w.heads, w.steps), random(w.kv_heads, keys), random(w.kv_heads, keys)]
        for _ in range(copies)
    ]


def _sdpa(device: TimingDevice, w: Workload, keys: int, copies: int) -> Callable[[], None]:
    layers = _plain_tensors(device, w, keys, copies)
    on_gpu = device.name == "cuda"

    def work() -> None:
        for query, key, value in layers:
            scaled_dot_product_attention(query, key, value, enable_gqa=w.heads != w.kv_heads)

    def flash() -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            work()

    return flash if on_gpu else work


def _flex(device: TimingDevice, w: Workload, copies: int) -> Callable[[], None]:
    from torch.nn.attention.flex_attention import flex_attention

    layers = _plain_tensors(device, w, w.keys, copies)
    compiled = torch.compile(flex_attention, dynamic=False)

    def work() -> None:
        for query, key, value in layers:
            compiled(query, key, value, enable_gqa=w.heads != w.kv_heads)

    return work


def _copy(device: TimingDevice, w: Workload, copies: int) -> Callable[[], None]:
    count = w.key_bytes // 2
    pairs = [
        [torch.zeros(count, dtype=torch.float16, device=device.name) for _ in range(2)]
        for _ in range(copies)
    ]

    def work() -> None:
        for source, target in pairs:
            target.copy_(source)

    return work
