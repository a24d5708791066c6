"""One step of the operator, ready for the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.support.operator_case import Case, History, shared_inputs


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
