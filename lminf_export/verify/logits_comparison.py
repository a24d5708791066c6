"""Compares the logits of a bundle, run in several ways, with the reference's.

A mixture of experts is compared under the bundle's own choice of experts. The reference itself is
compared with the unmodified model of transformers, inside the window, where both must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.progress import Progress
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.verify.comparison import Comparison, Logits, compare, run_in_pieces
from lminf_export.verify.reference_model import Reference
from lminf_export.verify.routing_check import (
    RoutingReport,
    RoutingWatch,
    compare_routing,
    experts_of,
    find_choices,
    largest_difference,
)
from lminf_export.verify.tolerance import FLOAT32_TOLERANCE, Precision

# Names and sizes of pieces, repeated over the stream.
WAYS = (("token by token", (1,)), ("in uneven chunks", (1, 7, 31, 2, 113, 3)))
# Stock models compute angles in float32; up to this position the error stays below the tolerance.
STOCK_LIMIT = 1024


@dataclass(frozen=True)
class BundleRun:
    """A bundle's model and the stream it is run on.

    Attributes:
        model: the bundle's model.
        tokens: (T,) the stream.
        progress: called with the fraction that is done.
    """

    model: LanguageModel
    tokens: NDArray[np.int64]
    progress: Progress

    def logits(self, name: str, sizes: Sequence[int]) -> Logits:
        """Return logits (T, V) of the stream in pieces of repeating sizes."""
        self.progress(name, 0.0)
        return run_in_pieces(
            self.model, self.tokens, sizes, lambda fraction: self.progress(name, fraction)
        )


def compare_dense(
    run: BundleRun, reference: Reference, dtype: torch.dtype
) -> tuple[list[Comparison], Logits]:
    """Compare the bundle's logits in each of `WAYS`; return those of the last, too."""
    wanted = reference.logits(dtype)
    precision = Precision(run.model.bundle)
    tolerance = precision.tolerance(precision.yardstick(reference, dtype), wanted)
    comparisons = []
    for name, sizes in WAYS:
        logits = run.logits(name, sizes)
        comparisons.append(compare(name, logits, wanted, tolerance))
    return comparisons, logits


def compare_routed(
    run: BundleRun, reference: Reference, dtype: torch.dtype, watch: RoutingWatch
) -> tuple[list[Comparison], Logits, list[RoutingReport]]:
    """Compare a mixture of experts under the bundle's own routing, and the routing itself.

    Returns:
        Comparisons and the last logits, as `compare_dense`; a report of the routing for each way.
        No such reports for a model whose routers do not choose as `Routed` expects.
    """
    precision = Precision(run.model.bundle)
    comparisons, reports = [], []
    for name, sizes in WAYS:
        logits = run.logits(name, sizes)
        chosen = watch.take(len(run.tokens))
        routed = reference.routed(chosen)
        wanted = reference.logits(dtype, routed)
        scores = routed.all_scores()
        if len(scores) != len(chosen):
            return (*compare_dense(run, reference, dtype), [])
        error = FLOAT32_TOLERANCE * max(_range(score) for score in scores)
        low = reference.routed(chosen)
        yardstick = precision.yardstick(reference, dtype, low)
        if yardstick is not None:
            error = largest_difference(low.all_scores(), scores)
        comparisons.append(compare(name, logits, wanted, precision.tolerance(yardstick, wanted)))
        reports.append(compare_routing(scores, chosen, error, reference.groups()))
    return comparisons, logits, reports


def _range(score: torch.Tensor) -> float:
    finite = score[score.isfinite()]
    return float(finite.max() - finite.min())


def routing_watch(model: LanguageModel, original: Checkpoint) -> RoutingWatch | None:
    """Return a recorder of the experts that a bundle chooses, None for one without experts."""
    if not find_choices(model.bundle):
        return None
    experts = experts_of(original.skeleton.model)
    return RoutingWatch(model.session, model.bundle) if experts else None


def compare_with_stock(reference: Reference, dtype: torch.dtype, bundle: Bundle) -> Comparison:
    """Compare the reference with the unmodified model where both must agree: inside the window.

    The reference's caches are exact here, whatever the bundle's are.
    """
    reference = replace(reference, rounded=None)
    count = min(bundle.manifest.settings.window_size, STOCK_LIMIT, len(reference.tokens))
    own = reference.own_routing()
    wanted = reference.logits(dtype, own, count)
    chosen = reference.routed(own.all_taken()) if own is not None and own.taken else None
    return compare(
        f"reference and stock model, first {count}",
        reference.stock_logits(count, chosen),
        wanted,
        FLOAT32_TOLERANCE,
    )
