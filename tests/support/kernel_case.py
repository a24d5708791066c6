"""One step of the operator, ready for the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.support.operator_case import Case, History, shared_inputs
from scripts.gpu import streams
from scripts.gpu.emulated_device import counters, reset_counters
from scripts.gpu.kernel_library import KernelLibrary, params_of


def one_step(
    case: Case,
    bases: tuple[int, ...],
    new_lengths: tuple[int, ...],
    dtype: torch.dtype,
    capacity: int | None = None,
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Inputs, outputs and attributes of one step in place; the ring is the case's by itself."""
    capacity = capacity or case.capacity
    width = max(1, *new_lengths)
    history = History(case, list(bases), width, dtype)
    past, new = torch.tensor(bases), torch.tensor(new_lengths)
    caches = history.caches(capacity)
    shared = shared_inputs(case, past, new, width, capacity)
    inputs = [x.contiguous() for x in (*history.chunk(past, new, width), *caches, *shared)]
    output = torch.full_like(inputs[0], float("nan"))
    return inputs, [output, *inputs[3:7]], case.attributes()


def assert_a_chunk_copies_what_its_rows_see(library: KernelLibrary) -> None:
    """Run blocks of 128 rows on the emulation; no tile is copied that no row of a block sees."""
    case = streams.SMALL.with_(
        window_size=64, num_sink_tokens=0, chunk_size=256, num_heads=1, num_kv_heads=1
    )
    inputs, outputs, attributes = one_step(case, (10**6,), (256,), torch.float16)
    reset_counters(library)
    library.launch(params_of(inputs, outputs, attributes), None)
    # Blocks of 128 rows see 128 + 63 keys: three tiles of 64 each, of five in the ring.
    assert counters(library).copied_bytes == 2 * 3 * 64 * case.head_dim * 2 * 2
