"""The result of `validate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lminf_export.verify.comparison import Comparison
from lminf_export.verify.perplexity_cost import PerplexityCost
from lminf_export.verify.recorded_rings import RingCost, RingReport
from lminf_export.verify.routing_check import RoutingReport


@dataclass(frozen=True)
class ValidationReport:
    """All comparisons of one bundle.

    Attributes:
        bundle: the bundle's folder name.
        dtype: its element type.
        window_size: W.
        tested_window: the largest window of a layer in the test, which may be smaller.
        reference_dtype: element type of the reference.
        comparisons: one for each way of running.
        differing_weights: tensors that are not the original model's, converted; None where no
            model was given to compare with.
        compared_with: the model whose weights the reference has, and an adapter merged into it;
            None where they are the bundle's own.
        quantization: how weights are stored, in words; None where they are not quantised.
        kv_cache_dtype: element type of the rings where it is not dtype, else None.
        perplexity_cost: perplexity with and without quantisation of weights and caches; None
            where it was not measured: without a text, or for quantised weights without the
            original model.
        routing: for a mixture of experts, the comparison of its choices with the reference's, one
            for each way of running. Logits are compared under the bundle's choices.
        rings: for int8 rings, the comparison of their content with what the reference rounds to,
            one for each way of running. Logits are compared over the bundle's content.
        ring_cost: how far rounding the rings alone moves the logits; None for rings of dtype.
    """

    bundle: str
    dtype: str
    window_size: int
    reference_dtype: str
    comparisons: tuple[Comparison, ...]
    differing_weights: tuple[str, ...] | None = None
    compared_with: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    perplexity_cost: PerplexityCost | None = None
    routing: tuple[RoutingReport, ...] = ()
    tested_window: int | None = None
    notes: tuple[str, ...] = ()
    rings: tuple[RingReport, ...] = ()
    ring_cost: RingCost | None = None

    @property
    def passed(self) -> bool:
        """Whether all comparisons passed: logits, weights, experts, int8 rings and their cost."""
        ties = all(row.passed for row in self.routing) and all(row.passed for row in self.rings)
        ties = ties and (self.ring_cost is None or self.ring_cost.passed)
        return ties and all(x.passed for x in self.comparisons) and not self.differing_weights

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {**asdict(self), "passed": self.passed}
