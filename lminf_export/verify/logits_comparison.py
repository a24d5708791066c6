"""Compares the logits of a bundle, run in several ways, with the reference's, block by block.

A mixture of experts is compared under the bundle's own choice of experts, rings of int8 over what
the bundle's own rings held. The reference itself is
compared with the unmodified model of transformers, inside the window, where both must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.progress import Progress
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.verify.bundle_run import BundleRun
from lminf_export.verify.comparison import (
    BLOCK_ELEMENTS,
    Comparison,
    Differences,
    LogitRange,
    Logits,
    token_blocks,
)
from lminf_export.verify.likelihood import negative_log_likelihood
from lminf_export.verify.recorded_rings import RecordedRings, RingCost, RingReport
from lminf_export.verify.reference_model import Reference, ReferenceLogits
from lminf_export.verify.routing_check import (
    RoutingReport,
    RoutingWatch,
    compare_routing,
    experts_of,
    find_choices,
    largest_difference,
)
from lminf_export.verify.small_window import SmallWindow
from lminf_export.verify.tolerance import FLOAT32_TOLERANCE, Precision

# Names and sizes of pieces, repeated over the stream.
WAYS = (("token by token", (1,)), ("in uneven chunks", (1, 7, 31, 2, 113, 3)))
Way = tuple[str, Sequence[int]]
# Stock models compute angles in float32; up to this position the error stays below the tolerance.
STOCK_LIMIT = 1024


@dataclass(frozen=True)
class Stream:
    """A bundle's model and the stream it is compared on.

    Attributes:
        model: the bundle's model.
        tokens: (T,) the stream.
        progress: called with the fraction that is done.
    """

    model: LanguageModel
    tokens: NDArray[np.int64]
    progress: Progress

    def run(self, sizes: Sequence[int]) -> BundleRun:
        """Return a run of the bundle in pieces of repeating sizes, which fit into a block."""
        most = max(1, BLOCK_ELEMENTS // self.model.vocab_size)
        return BundleRun(self.model, self.tokens, [min(size, most) for size in sizes])


@dataclass
class Found:
    """The result of all comparisons with a bundle.

    Attributes:
        comparisons: one for each way of running.
        routing: reports of the choice of experts, one for each way; none without experts.
        losses: (T − 1,) nats that the bundle's last run gives the tokens behind the first.
        exact: the reference's logits over exact rings, without experts.
        rings: reports of the content of int8 rings, one for each way; none without.
        ring_cost: what rounding them costs; None without.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    routing: list[RoutingReport] = field(default_factory=list)
    losses: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    exact: ReferenceLogits | None = None
    rings: list[RingReport] = field(default_factory=list)
    ring_cost: RingCost | None = None


def compare_dense(stream: Stream, reference: Reference, dtype: torch.dtype) -> Found:
    """Compare the bundle's logits in each of `WAYS`."""
    precision = Precision(stream.model.bundle)
    if reference.rounded is None:
        wanted = reference.logits(dtype)
        yardstick = precision.yardstick(reference)
        comparisons, losses = _compare(stream, WAYS, wanted, yardstick)
        return Found(comparisons, losses=losses, exact=wanted)
    found = Found()
    for name, sizes in WAYS:
        followed, rings = _recorded(stream, reference, sizes)
        wanted = followed.logits(dtype)
        yardstick = precision.yardstick(followed)
        comparisons, found.losses = _compare(stream, [(name, sizes)], wanted, yardstick)
        found.comparisons += comparisons
        found.rings += [ring.report(comparisons[0].tolerance) for ring in rings]
    found.exact = replace(reference, rounded=None).logits(dtype)
    found.ring_cost = _ring_cost(stream, wanted, found.exact)
    return found


def _recorded(
    stream: Stream, reference: Reference, sizes: Sequence[int]
) -> tuple[Reference, list[RecordedRings]]:
    """Run the bundle once without logits; return a reference over what its int8 rings held.

    A bundle without such rings is run all the same: experts may be watched.
    """
    if reference.rounded is None:
        stream.run(sizes).skip()
        return reference, []
    contract = stream.model.bundle.manifest.contract
    rings = RecordedRings(contract, len(stream.tokens), reference.rounded.keeps_bias)
    stream.progress("recording int8 rings", None)
    stream.run(sizes).skip(rings.take)
    return replace(reference, rounded=rings), [rings]


def _ring_cost(stream: Stream, rounded: ReferenceLogits, exact: ReferenceLogits) -> RingCost:
    scale, differences = LogitRange(), Differences()
    for start, stop in token_blocks(len(stream.tokens), stream.model.vocab_size):
        right = exact.rows(start, stop)
        scale.add(right)
        differences.add(rounded.rows(start, stop), right)
    found = differences.relative_to(scale, "", 0.0)
    return RingCost(found.max_error, found.mean_error)


def compare_routed(
    stream: Stream, reference: Reference, dtype: torch.dtype, watch: RoutingWatch
) -> Found:
    """Compare a mixture of experts under the bundle's own routing, and the routing itself.

    A model whose routers do not choose as `Routed` expects is compared as one without experts.
    """
    precision, found = Precision(stream.model.bundle), Found()
    for name, sizes in WAYS:
        stream.progress(f"experts {name}", None)
        followed, rings = _recorded(stream, reference, sizes)
        chosen = watch.take(len(stream.tokens))
        routed = reference.routed(chosen)
        wanted = followed.logits(dtype, routed)
        scores = routed.all_scores()
        if len(scores) != len(chosen):
            return compare_dense(stream, reference, dtype)
        error = FLOAT32_TOLERANCE * max(_range(score) for score in scores)
        low = reference.routed(chosen)
        yardstick = precision.yardstick(followed, low)
        if yardstick is not None:
            error = largest_difference(low.all_scores(), scores)
        found.routing.append(compare_routing(scores, chosen, error, reference.groups()))
        comparisons, found.losses = _compare(stream, [(name, sizes)], wanted, yardstick)
        found.comparisons += comparisons
        found.rings += [ring.report(comparisons[0].tolerance) for ring in rings]
        watch.clear()
    if reference.rounded is not None:
        exact = replace(reference, rounded=None).logits(dtype, reference.routed(chosen))
        found.ring_cost = _ring_cost(stream, wanted, exact)
    return found


def _compare(
    stream: Stream,
    ways: Sequence[Way],
    wanted: ReferenceLogits,
    yardstick: ReferenceLogits | None,
) -> tuple[list[Comparison], NDArray[np.float64]]:
    """Compare the bundle's runs with wanted logits, all a block of tokens at a time.

    Returns:
        One comparison for each way; the nats of the tokens behind the first, by the last way.
    """
    model, tokens = stream.model, stream.tokens
    scale, rounding = LogitRange(), Differences()
    runs = [stream.run(sizes) for _, sizes in ways]
    differences = [Differences() for _ in ways]
    losses = []
    for start, stop in token_blocks(len(tokens), model.vocab_size):
        stream.progress("comparing logits", start / len(tokens))
        right = wanted.rows(start, stop)
        scale.add(right)
        if yardstick is not None:
            rounding.add(yardstick.rows(start, stop), right)
        for run, found in zip(runs, differences, strict=True):
            place = start
            for piece in run.rows(stop - start):
                found.add(piece, right[place - start : place - start + len(piece)])
                if run is runs[-1]:
                    losses.append(_losses(piece, tokens, place))
                place += len(piece)
    error = None if yardstick is None else rounding.relative_to(scale, "", 0).max_error
    tolerance = Precision(model.bundle).tolerance(error)
    comparisons = [
        found.relative_to(scale, name, tolerance)
        for (name, _), found in zip(ways, differences, strict=True)
    ]
    return comparisons, np.concatenate(losses)


def losses_of(reference: ReferenceLogits, stream: Stream) -> NDArray[np.float64]:
    """Return the nats (T − 1,) that a model gives the tokens behind the first."""
    blocks = token_blocks(len(stream.tokens), stream.model.vocab_size)
    return np.concatenate(
        [_losses(reference.rows(start, stop), stream.tokens, start) for start, stop in blocks]
    )


def _losses(logits: Logits, tokens: NDArray[np.int64], start: int) -> NDArray[np.float64]:
    """Return the nats of the tokens behind those that logits (n, V) stand at, from `start` on."""
    targets = tokens[start + 1 : start + 1 + len(logits)]
    return negative_log_likelihood(logits[: len(targets)], targets, np.float64)


def _range(score: torch.Tensor) -> float:
    finite = score[score.isfinite()]
    return float(finite.max() - finite.min())


def routing_watch(model: LanguageModel, original: Checkpoint) -> RoutingWatch | None:
    """Return a recorder of the experts that a bundle chooses, None for one without experts."""
    if not find_choices(model.bundle):
        return None
    experts = experts_of(original.skeleton.model)
    return RoutingWatch(model.session, model.bundle) if experts else None


def compare_with_stock(
    reference: Reference, dtype: torch.dtype, small: SmallWindow, wanted: ReferenceLogits | None
) -> Comparison:
    """Compare the reference with the unmodified model where both must agree: inside the window.

    Args:
        reference: of the bundle. Its caches are exact here, whatever the bundle's are.
        dtype: in which it computes.
        small: the bundle as it is tested.
        wanted: its logits over exact caches if they are known; experts are the model's own here.
    """
    count = min(small.common_length, STOCK_LIMIT, len(reference.tokens))
    routed = None
    if wanted is None:
        own = reference.own_routing()
        wanted = replace(reference, rounded=None).logits(dtype, own, count)
        routed = reference.routed(own.all_taken()) if own is not None and own.taken else None
    stock = reference.stock_logits(count, routed)
    scale, differences = LogitRange(), Differences()
    for start, stop in token_blocks(count, small.bundle.manifest.vocab_size):
        right = wanted.rows(start, stop)
        scale.add(right)
        differences.add(stock.rows(start, stop), right)
    name = f"reference and stock model, first {count}"
    return differences.relative_to(scale, name, FLOAT32_TOLERANCE)
