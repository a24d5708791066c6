"""The kernels against the float64 mathematics, on whatever device a library's kernels run.

Nothing is taken on trust: outputs start as NaN, every tensor has guard bytes around it, the
slots no query of a step may see are NaN, and so is the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.support.operator_case import Case, History, shared_inputs
from lminf_export.operator import reference
from scripts.gpu.kernel_library import KernelLibrary, Params, params_of
from scripts.gpu.ring_kinds import Int8Rings, ModelRings, RingKind, same

GUARD_BYTES = 256
GUARD = 0xFF  # NaN in every floating type, −1 in an integer
# The bytes of an int8 output before anything is written.
UNWRITTEN = 0x55


@dataclass(frozen=True)
class Stream:
    """A stream that is fed through the kernels in steps.

    Attributes:
        name: what it shows.
        case: sizes and rules of the layer.
        bases: tokens each row has seen before the first step.
        chunks: real tokens of each row, step by step.
        dtype: of queries, keys and values.
        in_place: present tensors are their pasts.
        with_workspace: scratch memory is given; without, keys are not split.
        int8_rings: the rings hold int8.
    """

    name: str
    case: Case
    bases: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float16
    in_place: bool = True
    with_workspace: bool = True
    int8_rings: bool = False

    @property
    def rings(self) -> RingKind:
        """The kind of its rings."""
        return Int8Rings() if self.int8_rings else ModelRings()


@dataclass
class Outcome:
    """The result of one stream.

    Attributes:
        error: largest error against float64.
        torch_error: largest error of `same_precision`, against the same.
        kernels: which attention kernels ran.
        splits: most splits of a step.
        problems: everything else that was wrong, in words.
    """

    error: float = 0.0
    torch_error: float = 0.0
    kernels: set[str] = field(default_factory=set)
    splits: int = 1
    problems: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Error in units of torch's."""
        return self.error / self.torch_error if self.torch_error else 0.0


class Device(Protocol):
    """Where kernels run: memory, completion, limits."""

    name: str
    multiprocessors: int
    shared_bytes: int
    hopper: bool

    def stream(self) -> int:
        """Return the stream to enqueue on."""

    def synchronize(self) -> None:
        """Wait for everything enqueued."""


class Guarded:
    """A copy of a tensor on a device with guard bytes before and behind it."""

    def __init__(self, source: Tensor, device: str) -> None:
        size = source.numel() * source.element_size()
        self.memory = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device)
        flat = self.memory[GUARD_BYTES : GUARD_BYTES + size]
        self.tensor = flat.view(source.dtype).view(source.shape)
        self.tensor.copy_(source)

    def intact(self) -> bool:
        """Whether nothing wrote over the guards."""
        front, back = self.memory[:GUARD_BYTES], self.memory[-GUARD_BYTES:]
        return bool((front == GUARD).all() and (back == GUARD).all())


def run_stream(
    library: KernelLibrary, device: Device, stream: Stream, enqueue: Any = None
) -> Outcome:
    """Feed a stream through the kernels and compare every step.

    Args:
        library: the kernels.
        device: where they run.
        stream: what to feed.
        enqueue: called with (library, params, workspace) in place of a plain launch, for example
            to capture and replay a CUDA graph.

    Returns:
        Errors and problems; nothing is raised for a wrong result.
    """
    case, outcome, rings = stream.case, Outcome(), stream.rings
    length = max(sum(chunk[row] for chunk in stream.chunks) for row in range(len(stream.bases)))
    history = History(case, list(stream.bases), length, stream.dtype)
    wanted = history.oracle()
    past = torch.tensor(stream.bases)
    caches = rings.caches(history, case.capacity)
    for chunk in stream.chunks:
        new, width = torch.tensor(chunk), max(1, *chunk)
        shared = shared_inputs(case, past, new, width, case.capacity)
        state = [*history.chunk(past, new, width), *caches[:4], *shared, *caches[4:]]
        inputs = [x.contiguous() for x in state]
        expected = rings.expected(case, inputs)
        poisoned = list(inputs)
        for place, cache in zip(rings.places, poison(stream, inputs, new), strict=True):
            poisoned[place] = cache
        outputs = _step(library, device, stream, poisoned, outcome, enqueue)
        _compare_caches(stream, poisoned, outputs, outcome)
        present = rings.in_model_type(expected, stream.dtype)
        torch_output = same_precision(case, inputs, [expected[0], *present])
        starts = past - torch.tensor(stream.bases)
        truth = rings.truth(case, inputs, outputs)
        if truth is None:
            _compare_output(outputs[0], torch_output, wanted, starts, new, outcome)
        else:
            zeros = torch.zeros_like(starts)
            _compare_output(outputs[0], torch_output, truth, zeros, new, outcome)
        caches = list(expected[1:])
        if not case.num_sink_tokens:
            caches[2:4] = inputs[5:7]
        past = past + new
    return outcome


def poison(stream: Stream, inputs: list[Tensor], new: Tensor) -> list[Tensor]:
    """Return the caches with NaN wherever no query of this step may look."""
    case = stream.case
    caches = [inputs[place].clone() for place in stream.rings.places]
    past = inputs[7]
    held = reference.slot_positions(past, torch.zeros_like(past), caches[0].shape[2])
    dead = (held < 0) | (held < (past - case.window_size + 1)[:, None])
    stream.rings.poison_rings(caches, dead)
    if case.num_sink_tokens:
        seen = (past + new - case.window_size).clamp(0, case.num_sink_tokens)
        unseen = torch.arange(case.num_sink_tokens) >= seen[:, None]
        for sinks in caches[2:4]:
            sinks.masked_fill_(unseen[:, None, :, None], float("nan"))
    return caches


def _step(
    library: KernelLibrary,
    device: Device,
    stream: Stream,
    inputs: list[Tensor],
    outcome: Outcome,
    enqueue: Any,
) -> list[Tensor]:
    name, case = device.name, stream.case
    held = [Guarded(x, name) for x in inputs]
    outputs = [Guarded(torch.full_like(inputs[0], float("nan")), name)]
    # Sinks that are a shared constant of one row have no place to write to.
    places = stream.rings.places
    for position in places:
        constant = position in places[2:4] and not case.num_sink_tokens
        shape = (inputs[0].shape[0], *inputs[position].shape[1:])
        dtype = inputs[position].dtype
        blank = float("nan") if dtype.is_floating_point else UNWRITTEN
        fresh = torch.full(shape, blank, dtype=dtype)
        in_place = stream.in_place and (not constant or shape == inputs[position].shape)
        outputs.append(held[position] if in_place else Guarded(fresh, name))
    call = [x.tensor for x in held], [x.tensor for x in outputs]
    params = params_of(*call, case.attributes())
    size = library.workspace_size(params) if stream.with_workspace else 0
    workspace = Guarded(torch.full((size // 4,), float("nan")), name)
    limits = device.multiprocessors, device.shared_bytes
    plan = library.plan(params, *limits, size, hopper=device.hopper)
    outcome.kernels.add(plan.kernel)
    outcome.splits = max(outcome.splits, plan.splits)
    (enqueue or _launch)(library, params, workspace.tensor if size else None, device)
    device.synchronize()
    names = (*(f"input {i}" for i in range(len(held))), *("output",) * len(outputs), "workspace")
    for what, memory in zip(names, (*held, *outputs, workspace), strict=True):
        if not memory.intact():
            outcome.problems.append(f"{what}: guard bytes overwritten")
    for position, (before, after) in enumerate(zip(inputs, held, strict=True)):
        written = stream.in_place and position in places
        if not written and not same(before, after.tensor.cpu()):
            outcome.problems.append(f"input {position} changed")
    return [x.tensor.cpu() for x in outputs]


def same_precision(case: Case, inputs: list[Tensor], present: Any) -> Tensor:
    """Attend as torch's fused attention does in the inputs' type: the error to be measured by.

    Rotated queries and softmax weights are rounded to the type, products add up in float32.

    Args:
        case: sizes and rules of the layer.
        inputs: the operator's 17 inputs.
        present: what `reference.lambda_attention` returned for them; its caches are attended to.

    Returns:
        (B, H, S, D) in the type of the query.
    """
    query, dtype = inputs[0], inputs[0].dtype
    query_position, slot_position, cos, sin, limit_cos, limit_sin = inputs[9:15]
    local = sink = query.float()
    if case.rotary_dim:
        rotate, pairs = reference.rotate, case.interleaved
        local = rotate(query.float(), cos[:, None], sin[:, None], interleaved=pairs)
        sink = rotate(query.float(), limit_cos, limit_sin, interleaved=pairs)
    group = query.shape[1] // inputs[1].shape[1]
    keys, values, sink_keys, sink_values = (
        x.repeat_interleave(group, dim=1).float() for x in present[1:]
    )
    sink_position = torch.arange(sink_keys.shape[2])
    distances = query_position[:, :, None] - slot_position[:, None, :]
    sink_distances = query_position[:, :, None] - sink_position
    local_seen = reference.is_local(distances, case.window_size) & (slot_position >= 0)[:, None]
    sink_seen = reference.is_sink(
        sink_distances, sink_position, case.window_size, case.num_sink_tokens
    )
    logits = torch.cat(
        [
            sink.to(dtype).float() @ sink_keys.transpose(-1, -2),
            local.to(dtype).float() @ keys.transpose(-1, -2),
        ],
        dim=-1,
    )
    logits = logits * case.scale
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    limits = torch.full_like(sink_distances, case.limit)
    seen_distance = torch.cat([limits, distances], dim=-1)[:, None].float()
    logits = logits - case.alibi_slopes[:, None, None] * seen_distance
    seen = torch.cat([sink_seen, local_seen], dim=-1)[:, None]
    logits = logits.masked_fill(~seen, float("-inf"))
    top = logits.amax(dim=-1, keepdim=True).clamp_min(-1e30)
    weights = torch.exp(logits - top)
    total = weights.sum(dim=-1, keepdim=True)
    total = total + torch.exp(case.learned_logits[:, None, None] - top)
    sums = weights.to(dtype).float() @ torch.cat([sink_values, values], dim=2)
    return (sums / total.clamp_min(1e-30)).to(dtype)


def _launch(
    library: KernelLibrary, params: Params, workspace: Tensor | None, device: Device
) -> None:
    library.launch(params, workspace, device.stream())


def _compare_caches(
    stream: Stream, inputs: list[Tensor], outputs: list[Tensor], outcome: Outcome
) -> None:
    """Present tensors are the (poisoned) pasts with the new tokens written in, nothing else."""
    written = stream.rings.expected(stream.case, inputs)
    outcome.problems += stream.rings.ring_problems(outputs, written)
    for position in (3, 4) if stream.case.num_sink_tokens else ():
        if not same(outputs[position], written[position]):
            outcome.problems.append(f"present tensor {position} differs")


def _compare_output(
    output: Tensor,
    torch_output: Tensor,
    wanted: Tensor,
    starts: Tensor,
    new: Tensor,
    outcome: Outcome,
) -> None:
    """Compare a step's real rows; `wanted` (B, H, ·, D) has its first at `starts` (B,)."""
    if not torch.isfinite(output).all():
        outcome.problems.append("output is not finite")
        outcome.error = float("inf")
        return
    for row in range(len(output)):
        count, start = int(new[row]), int(starts[row])
        truth = wanted[row, :, start : start + count]
        if count:
            error = (output[row, :, :count].double() - truth).abs().max()
            torch_error = (torch_output[row, :, :count].double() - truth).abs().max()
            outcome.error = max(outcome.error, float(error))
            outcome.torch_error = max(outcome.torch_error, float(torch_error))
        if output[row, :, count:].any():
            outcome.problems.append("padded rows of output are not zero")
