"""The content of a bundle's int8 rings, token by token, for a reference that computes with it.

Where a value lies next to the tie of two integers, another precision rightly takes the other one,
and everything after it differs by far more than rounding in that precision. So logits are compared
over one content of the rings, the bundle's; and that content must be what the reference's own keys
and values round to but for near-ties, which is a claim with a bound of its own (`RingReport`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lminf_export.operator.bindings import RING_KINDS, SCALE_KINDS, past_name
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.reference import Rounding, real_type
from lminf_export.operator.reference_int8 import INT8_LIMIT, dequantize
from lminf_export.runtime.cache import State
from lminf_export.tensors.torch_dtypes import torch_dtype


@dataclass(frozen=True)
class RingReport:
    """Comparison of what a bundle's rings held with what the reference's round to.

    Attributes:
        largest_gap: in steps of the bundle's scales: by how much a value lies beyond half a step
            from its integer, or the largest of a row from 127 steps; less what the bundle's type
            cannot tell apart in a key that still has the bias that its ring keeps out.
        allowed_gap: largest gap that is rounding: 127 steps, which are the largest of a row, times
            the relative error that its values may have.
    """

    largest_gap: float
    allowed_gap: float

    @property
    def passed(self) -> bool:
        """Whether every integer and scale is right but for near-ties; NaN is not."""
        return self.largest_gap <= self.allowed_gap


# A value may err, relative to the largest of its own row, by so many times what a logit may err,
# relative to the range of all: rows are small and large, and there are more of them.
ROW_FACTOR = 3.0
# Mean error of a logit over the logits' range by rounding, from which on it is worth a notice, and
# beyond which an int8 cache makes no sense: docs/quantization.md says why.
NOTABLE_COST = 3e-3
LARGEST_COST = 1e-2


@dataclass(frozen=True)
class RingCost:
    """How far rounding alone moves the logits: the reference over int8 rings and over exact ones.

    Attributes:
        max_error: largest difference of a logit, relative to the logits' range.
        mean_error: mean difference, relative to the same range.
        limit: largest mean error that passes.
    """

    max_error: float
    mean_error: float
    limit: float = LARGEST_COST

    @property
    def is_notable(self) -> bool:
        """Whether a user should think about rings of the model's type."""
        return not self.mean_error <= NOTABLE_COST

    @property
    def passed(self) -> bool:
        """Whether an int8 cache makes sense for this model; NaN does not."""
        return self.mean_error <= self.limit


@dataclass
class RecordedRings:
    """The rings of all layers over a whole stream, for `HistoryStep`.

    Attributes:
        contract: of the bundle.
        num_tokens: T.
        keeps_bias: see `Rings`.
        is_checked: gaps are kept.
        content: for each layer and kind the integers (G, T, D) and the scales (G, T, 1).
        gaps: the largest of each layer, as in `RingReport`.
    """

    contract: GraphContract
    num_tokens: int
    keeps_bias: bool
    is_checked: bool = True
    content: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    gaps: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.content:
            return
        for index, layer in enumerate(self.contract.layers):
            shape = layer.num_kv_heads, self.num_tokens
            for kind in RING_KINDS:
                integers = torch.zeros((*shape, layer.head_dim), dtype=torch.int8)
                self.content[index, kind] = integers, torch.zeros(*shape, 1)

    def take(self, state: State, start: int, stop: int) -> None:
        """Keep what a state's rings hold of the tokens start … stop − 1."""
        for (layer, kind), kept in self.content.items():
            of_scales = dict(zip(RING_KINDS, SCALE_KINDS, strict=True))[kind]
            for name, tensor in zip((kind, of_scales), kept, strict=True):
                rows = state.ring_rows(past_name(layer, name), start, stop)[0]
                tensor[:, start:stop] = torch.from_numpy(np.ascontiguousarray(rows))

    def of_layer(
        self, layer: int, heads: slice, position: Tensor, bias: Tensor | None
    ) -> tuple[Rounding, Rounding]:
        """See `Rings`; B = 1, and every token is one of the stream."""
        of_bias = torch.zeros(1) if bias is None else _in_pairs_at_most(bias)
        place = layer, heads, position[0]
        return partial(self._read, "key", *place, of_bias), partial(
            self._read, "value", *place, torch.zeros(1)
        )

    def report(self, tolerance: float) -> RingReport:
        """Return the comparison with all that has been read.

        Args:
            tolerance: largest error of a logit that passes.
        """
        allowed = INT8_LIMIT * ROW_FACTOR * tolerance
        return RingReport(max(self.gaps.values(), default=0.0), allowed)

    def _read(
        self, kind: str, layer: int, heads: slice, position: Tensor, bias: Tensor, x: Tensor
    ) -> Tensor:
        integers, scale = (tensor[heads][:, position] for tensor in self.content[layer, kind])
        real = real_type(x)
        if self.is_checked:
            unit = torch.finfo(torch_dtype(self.contract.dtype)).eps
            gap = _gap(x[0].to(real), integers, scale.to(real), unit * bias.to(real))
            self.gaps[layer] = max(gap, self.gaps.get(layer, 0.0))
        return dequantize(integers, scale.to(real))[None]


def _in_pairs_at_most(bias: Tensor) -> Tensor:
    """Return for each head (G, 1, 1) a bound of what a rotation makes of a bias (G, D)."""
    return bias.double().square().sum(1).sqrt()[:, None, None]


def _gap(x: Tensor, integers: Tensor, scale: Tensor, lost: Tensor) -> float:
    """Return by how much rows (G, M, D) are not what these integers and scales stand for.

    Args:
        x: the reference's.
        integers: the bundle's.
        scale: (G, M, 1), the bundle's.
        lost: what the bundle's type cannot tell apart in a row that still has its bias.
    """
    largest = x.abs().amax(-1, keepdim=True)
    beyond = (x / scale - integers).abs().amax(-1, keepdim=True) - 0.5
    of_scale = (largest / scale - INT8_LIMIT).abs()
    gap = torch.maximum(beyond, of_scale) - lost / scale
    # A row of zeros has no scale.
    gap = torch.where((largest == 0) & (scale == 0), 0.0, gap)
    return float(gap.nan_to_num(torch.inf).max()) if gap.numel() else 0.0
