"""The kinds of rings that kernels are checked with: of the model's type, or of int8."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.support.int8_rings import attended, rounded_caches
from benchmarks.support.operator_case import Case, History
from lminf_export.operator import contract, reference
from lminf_export.operator.reference_int8 import dequantize, lambda_attention_int8_cache

_PAST = tuple(contract.input_names().index(name) for name in contract.input_names()[3:7])
_SCALES = (len(contract.INPUTS), len(contract.INPUTS) + 1)
RING_KEY, RING_VALUE, SINK_KEY, SINK_VALUE, KEY_SCALE, VALUE_SCALE = range(1, 7)
# A rounding next to a tie falls to either side: so many of the numbers of keys may.
_MOST_TIES = 2e-3


class RingKind(Protocol):
    """One kind of ring.

    Attributes:
        places: of the caches among the node's inputs, in the order of its outputs behind the first.
    """

    places: tuple[int, ...]

    def caches(self, history: History, capacity: int) -> list[Tensor]:
        """Return the caches as they stand before the first query."""
        ...

    def expected(self, case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the specification's outputs."""
        ...

    def poison_rings(self, caches: list[Tensor], dead: Tensor) -> None:
        """Make slots (B, C) unreadable."""
        ...

    def ring_problems(self, got: list[Tensor], want: tuple[Tensor, ...]) -> list[str]:
        """Return which present rings are not what was to be written, padding included."""
        ...

    def in_model_type(self, present: Any, dtype: torch.dtype) -> list[Tensor]:
        """Return the four caches that an attention without such rings would read."""
        ...

    def truth(self, case: Case, inputs: list[Tensor], got: list[Tensor]) -> Tensor | None:
        """Return the right output (B, H, S, D) over what was written; None if by distances."""
        ...


class ModelRings:
    """Rings of the model's type."""

    places = _PAST

    def caches(self, history: History, capacity: int) -> list[Tensor]:
        """See `RingKind`."""
        return history.caches(capacity)

    def expected(self, case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """See `RingKind`."""
        return reference.lambda_attention(*inputs, **case.attributes())

    def poison_rings(self, caches: list[Tensor], dead: Tensor) -> None:
        """See `RingKind`."""
        for ring in caches[:2]:
            ring.masked_fill_(dead[:, None, :, None], float("nan"))

    def ring_problems(self, got: list[Tensor], want: tuple[Tensor, ...]) -> list[str]:
        """See `RingKind`."""
        # A device contracts the rotation's products: one unit in the last place of T, or of
        # the float32 products (up to 20) where they cancel.
        key, right = got[RING_KEY], want[RING_KEY]
        step = torch.finfo(key.dtype).eps * right.abs().float().nan_to_num()
        near = (key.float() - right.float()).abs() <= step + 2e-6
        found = [] if bool((near | (key.isnan() & right.isnan())).all()) else ["the keys differ"]
        return found + (
            [] if same(got[RING_VALUE], want[RING_VALUE]) else ["the values of the ring differ"]
        )

    def in_model_type(self, present: Any, dtype: torch.dtype) -> list[Tensor]:
        """See `RingKind`."""
        return list(present[1:])

    def truth(self, case: Case, inputs: list[Tensor], got: list[Tensor]) -> Tensor | None:
        """See `RingKind`."""
        return None


class Int8Rings:
    """Rings of int8 with a scale for each token and head."""

    places = (*_PAST, *_SCALES)

    def caches(self, history: History, capacity: int) -> list[Tensor]:
        """See `RingKind`."""
        caches, scales = rounded_caches(history, capacity)
        return [*caches, *scales]

    def expected(self, case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """See `RingKind`."""
        return lambda_attention_int8_cache(*inputs, **case.attributes())

    def poison_rings(self, caches: list[Tensor], dead: Tensor) -> None:
        """See `RingKind`."""
        for ring in caches[:2]:
            ring.masked_fill_(dead[:, None, :, None], 99)
        for scale in caches[4:]:
            scale.masked_fill_(dead[:, None, :, None], float("nan"))

    def ring_problems(self, got: list[Tensor], want: tuple[Tensor, ...]) -> list[str]:
        """See `RingKind`."""
        found = []
        for value in (RING_VALUE, VALUE_SCALE):  # nothing is computed before they are rounded
            if not same(got[value], want[value]):
                found.append(f"present tensor {value} differs")
        off = (got[RING_KEY].int() - want[RING_KEY].int()).abs()
        if off.max() > 1 or (off != 0).float().mean() > _MOST_TIES:
            found.append(f"the keys differ by up to {int(off.max())} steps")
        near = torch.isclose(got[KEY_SCALE], want[KEY_SCALE], rtol=1e-6, atol=0, equal_nan=True)
        return found if bool(near.all()) else [*found, "the scales of keys differ"]

    def in_model_type(self, present: Any, dtype: torch.dtype) -> list[Tensor]:
        """See `RingKind`."""
        rings = (
            dequantize(present[ring], present[scale]).to(dtype)
            for ring, scale in ((RING_KEY, KEY_SCALE), (RING_VALUE, VALUE_SCALE))
        )
        return [*rings, present[SINK_KEY], present[SINK_VALUE]]

    def truth(self, case: Case, inputs: list[Tensor], got: list[Tensor]) -> Tensor | None:
        """See `RingKind`."""
        scales = [scale.nan_to_num() for scale in got[KEY_SCALE:]]
        # Sinks that no query sees may hold NaN, whose products are NaN under the mask too.
        sinks = [x.nan_to_num() for x in got[SINK_KEY : SINK_VALUE + 1]]
        if not case.num_sink_tokens:
            sinks = [x.nan_to_num() for x in inputs[5:7]]
        return attended(case, inputs, [got[RING_KEY], got[RING_VALUE], *sinks], scales)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN where NaN is expected."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
