"""The experts that a bundle's tokens are routed to, so that a reference uses the same ones.

A router takes the experts with the best scores. Where two scores nearly tie, another precision
rightly takes the other one, and everything after it differs by far more than rounding. So logits
are compared under one routing, the bundle's; and each choice that is not the reference's own must
have been a near-tie, which is a claim with a bound of its own (`RoutingReport`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lminf_export.bundle.folder import Bundle
from lminf_export.models.expert_facts import CHOICE_PREFIX, NO_GROUPS, Groups, experts_per_token
from lminf_export.runtime.session import Session


@dataclass(frozen=True)
class RoutingReport:
    """Comparison of a bundle's choice of experts with the reference's own.

    Attributes:
        choices: experts chosen, over all tokens and layers.
        differing: of them not the reference's.
        largest_gap: by how much the reference's router scored a differing choice below its own;
            for a differing group, half of that, since its score is a sum of two.
        allowed_gap: largest gap that is rounding: twice, for each of the two scores that are
            compared, the largest error that torch makes in the bundle's precision.
    """

    choices: int
    differing: int
    largest_gap: float
    allowed_gap: float

    @property
    def passed(self) -> bool:
        """Whether every differing choice was a near-tie."""
        return self.largest_gap <= self.allowed_gap


def find_choices(bundle: Bundle) -> list[str]:
    """Return the graph's values that hold chosen experts, layer by layer; none without experts."""
    graph = onnx.load(str(bundle.graph_path), load_external_data=False).graph
    names = (name for node in graph.node for name in node.output)
    return [name for name in names if name.startswith(CHOICE_PREFIX)]


class RoutingWatch:
    """Records the experts that the tokens of one stream meet.

    Args:
        session: of the bundle.
        bundle: one whose graph chooses experts.

    Attributes:
        session: one whose steps are recorded.
    """

    def __init__(self, session: Session, bundle: Bundle) -> None:
        self._names = find_choices(bundle)
        self._steps: list[Mapping[str, NDArray[np.int64]]] = []
        self.session = session.watch(self._names, self._steps.append)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._steps.clear()

    def take(self, num_tokens: int) -> list[Tensor]:
        """Return for each layer with experts those of the T tokens (T, k) read since the last call.

        Args:
            num_tokens: T.
        """
        layers = [np.concatenate([step[name] for step in self._steps]) for name in self._names]
        self.clear()
        return [torch.from_numpy(layer.reshape(num_tokens, -1)) for layer in layers]


@dataclass(eq=False)
class Routed(TorchFunctionMode):
    """Sends a model's tokens to given experts, and records the scores of its routers.

    Routers choose by `topk`, or expert by expert by `max`. Within this mode both return the given
    experts, with their scores; where none are given, their own, which are kept.

    Attributes:
        num_experts: E.
        chosen: for each layer (T, k) int64, or None.
        start: first token of the present block.
        scores: for each layer and block (tokens, E), float64; of routers that take groups first,
            before that.
        taken: for each layer and block (tokens, k), the experts taken.
    """

    num_experts: int
    top_k: int
    chosen: list[Tensor] | None = None
    start: int = 0
    scores: list[list[Tensor]] = field(default_factory=list)
    taken: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._picked: list[Tensor] = []
        self._ungrouped: Tensor | None = None
        self._layer = self._before = 0

    def begin(self) -> None:
        """Prepare for a forward pass of all tokens, layer by layer."""
        self.start, self._layer, self._before, self._picked = 0, 0, 0, []

    def begin_layer(self) -> None:
        """Prepare for the first block of tokens of the next layer."""
        self._before = self._layer

    def begin_block(self, start: int) -> None:
        """Prepare for a block of the layer's tokens whose first has the position `start`."""
        self.start, self._layer, self._picked = start, self._before, []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        scores: Any = args[0] if args else None
        # Routers are recognised by what they call: topk or max over one score for each expert.
        is_scores = isinstance(scores, Tensor) and scores.dim() in (2, 3)
        is_scores = is_scores and scores.shape[1:].numel() == self.num_experts
        if not is_scores:
            return result
        if func in (torch.topk, Tensor.topk):
            if scores.dim() == 3:
                # (T, groups, experts of a group): the router chooses groups, and masks the scores
                # of all others before it chooses experts. Kept are the scores before the mask.
                self._ungrouped = scores.flatten(1)
                return result
            # Another k is a choice of something else.
            return self._choose(result, scores) if result[1].shape[1] == self.top_k else result
        if func in (torch.max, Tensor.max) and scores.dim() == 2 and keywords.get("keepdim"):
            return self._choose_next(result, scores)
        return result

    def _choose(self, result: Any, scores: Tensor) -> Any:
        """Answer a topk: the given experts, or the router's own, with their scores."""
        index = self._given(len(scores))
        if index is None:
            index = result[1]
        self._keep(scores if self._ungrouped is None else self._ungrouped, index)
        self._ungrouped = None
        return type(result)((scores.gather(1, index), index))

    def _choose_next(self, result: Any, scores: Tensor) -> Any:
        """Answer one of k calls of max: the router masks an expert before it asks for the next."""
        given = self._given(len(scores))
        place = len(self._picked)
        index = result[1] if given is None else given[:, place : place + 1]
        if not place:
            self._first = scores  # of all experts: none is masked yet
        self._picked.append(index)
        if len(self._picked) == self.top_k:
            self._keep(self._first, torch.cat(self._picked, 1))
            self._picked = []
        return type(result)((scores.gather(1, index), index))

    def _given(self, count: int) -> Tensor | None:
        if self.chosen is None:
            return None
        return self.chosen[self._layer][self.start : self.start + count]

    def _keep(self, scores: Tensor, index: Tensor) -> None:
        """Record a layer's scores and experts; routers are called layer by layer."""
        if len(self.scores) == self._layer:
            self.scores.append([])
            self.taken.append([])
        self.scores[self._layer].append(scores.to(torch.float64))
        self.taken[self._layer].append(index)
        self._layer += 1

    def all_scores(self) -> list[Tensor]:
        """Return for each layer the scores (T, E) of all tokens."""
        return [torch.cat(layer) for layer in self.scores]

    def all_taken(self) -> list[Tensor]:
        """Return for each layer the experts (T, k) of all tokens."""
        return [torch.cat(layer) for layer in self.taken]


def experts_of(model: nn.Module) -> tuple[int, int] | None:
    """Return how many experts a model's layers have, and how many a token meets; or None."""
    counts: set[Any] = {
        module.num_experts
        for module in model.modules()
        if hasattr(module, "num_experts") and hasattr(module, "down_proj")
    }
    top_k = experts_per_token(model.config)
    return (counts.pop(), top_k) if len(counts) == 1 and top_k else None


def compare_routing(
    scores: list[Tensor], taken: list[Tensor], error: float, groups: Groups = NO_GROUPS
) -> RoutingReport:
    """Compare the experts taken with those a reference's routers scored best.

    Args:
        scores: for each layer (T, E) of the reference, under the routing that was taken, before
            groups are.
        taken: for each layer (T, k).
        error: largest error of a score in the bundle's precision.
        groups: how the routers choose groups.
    """
    choices = differing = 0
    largest = 0.0
    for score, index in zip(scores, taken, strict=True):
        count, gap = _gap(score, index, groups)
        choices, differing = choices + index.numel(), differing + count
        largest = max(largest, gap)
    return RoutingReport(choices, differing, largest, 4 * error)


def _gap(score: Tensor, taken: Tensor, groups: Groups) -> tuple[int, float]:
    """Return how many of a layer's choices differ from the best, and the largest gap.

    Which groups a token's experts were chosen from is not known. It is enough that some choice of
    groups explains the experts: the one that needs the smallest gap does.
    """
    size = score.shape[1] // groups.number
    # A group's value is the sum of its two best scores, as routers compute it.
    by_group = score.unflatten(1, (groups.number, size))
    value = by_group.topk(min(2, size)).values.sum(-1)
    explained = torch.full((len(score),), torch.inf, dtype=score.dtype)
    differing = torch.zeros(len(score), dtype=torch.int64)
    for inside in combinations(range(groups.number), groups.top_k):
        outside = [group for group in range(groups.number) if group not in inside]
        group_gap = torch.zeros_like(explained)
        if outside:
            # How much better the best group left out is than the worst one taken. A value is a sum
            # of two scores, so its error is twice that of a score: half of the excess counts.
            excess = value[:, outside].amax(1) - value[:, list(inside)].amin(1)
            group_gap = excess.clamp(min=0.0) / 2
        reachable = by_group.index_fill(1, torch.tensor(outside, dtype=torch.int64), -torch.inf)
        other, gap = _gap_within(reachable.flatten(1), taken)
        differing = torch.where(group_gap == 0, other, differing)
        explained = torch.minimum(explained, torch.maximum(group_gap, gap))
    return int(differing.sum()), float(explained.max())


def _gap_within(score: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each token how many experts taken are not its best, and the largest gap."""
    own = score.topk(taken.shape[1]).indices
    other = ~(taken[:, :, None] == own[:, None, :]).any(-1)
    least = score.gather(1, own).amin(1, keepdim=True)
    gap = (least - score.gather(1, taken)).masked_fill(~other, 0.0)
    return other.sum(1), gap.amax(1)


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest difference of two lists of scores."""
    return max(
        float((x - y).abs().masked_fill(x == y, 0.0).max())  # what is masked is infinite in both
        for x, y in zip(left, right, strict=True)
    )
