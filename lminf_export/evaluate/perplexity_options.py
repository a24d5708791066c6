"""Methods and settings of a perplexity evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from lminf_export.errors import InputError
from lminf_export.operator.settings import as_integer

LAMBDA = "lambda"
LABELS = {
    LAMBDA: "Λ export, bounded cache (onnxruntime)",
    "stock": "unmodified model, full cache (torch)",
    "window": "sliding window, no sinks (torch)",
    "streaming": "StreamingLLM, positions by cache index (torch)",
    "recompute": "last W tokens read afresh for each target (torch)",
    "reference": "Λ by the specification (torch)",
}
COMPARISONS = tuple(name for name in LABELS if name != LAMBDA)
DEFAULT_TARGETS = 2000
DEFAULT_BUDGET_SECONDS = 600.0


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation.

    Attributes:
        compare: names out of COMPARISONS.
        model: original model the comparisons take their weights from; the bundle's by default.
        trust_remote_code: run Python that the model's repository, or the bundle, brings.
        targets: sampled targets of each bucket for "recompute".
        budget_seconds: time each comparison may take.
        buckets_per_octave: buckets for each doubling of the context.
        seed: of the sampled targets.
    """

    compare: tuple[str, ...] = ()
    model: str | None = None
    trust_remote_code: bool = False
    targets: int = DEFAULT_TARGETS
    budget_seconds: float = DEFAULT_BUDGET_SECONDS
    buckets_per_octave: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.compare:
            if name not in COMPARISONS:
                raise InputError(
                    f"unknown comparison {name!r}; there are: {', '.join(COMPARISONS)}"
                )
        as_integer("targets", self.targets, 1, InputError)
        as_integer("buckets_per_octave", self.buckets_per_octave, 1, InputError)
        if not self.budget_seconds > 0:
            raise InputError(f"budget_seconds={self.budget_seconds}: must be above 0")
