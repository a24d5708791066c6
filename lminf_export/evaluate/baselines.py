"""Attention as other methods do it, over a history of keys: what Λ is compared with.

Letters: B batch, H query heads, S new tokens, M keys, N sink tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lminf_export.models.base import AttentionCall, AttentionPlan, Rotation
from lminf_export.operator import reference

UNBOUNDED = 2**62


class CachedStep:
    """Answers attention over a history of unrotated keys, with configurable distances.

    Args:
        plan: how the layers attend; the windows of sliding layers are their own.
        num_sink_tokens: N, starting tokens that stay.
        window_size: W, last keys that are seen; UNBOUNDED for all.
        by_cache_place: whether a sink's distance is that of places in a cache of N + W tokens.
    """

    def __init__(
        self, plan: AttentionPlan, num_sink_tokens: int, window_size: int, by_cache_place: bool
    ) -> None:
        self.plan = plan
        self.num_sink_tokens, self.window_size = num_sink_tokens, window_size
        self.by_cache_place = by_cache_place
        self.past_length = 0
        self.history: dict[int, list[Tensor]] = {}
        self._position: dict[int, Tensor] = {}

    def advance(self, count: int) -> None:
        """Count the tokens of a step that has been read."""
        self.past_length += count

    def attend(self, call: AttentionCall) -> Tensor:
        """Append to the layer's history and attend over what is visible of it."""
        layer, plan = call.layer, self.plan
        sliding = bool(plan.sliding and plan.sliding[layer])
        window = plan.layers[layer].window_size if sliding else self.window_size
        sinks = 0 if sliding else self.num_sink_tokens
        key, value, position = self._append(call, window, sinks)
        query_position = self.past_length + torch.arange(call.query.shape[2])
        index = plan.layer_rotation[layer]
        rotation = None if index is None else plan.rotations[index]
        return _attend(
            call, key, value, query_position, position, plan, rotation,
            window=window, sinks=sinks,
            reach=sinks + window - 1 if self.by_cache_place else UNBOUNDED,
        )  # fmt: skip

    def _append(self, call: AttentionCall, window: int, sinks: int) -> tuple[Tensor, ...]:
        """Add the new keys; forget those that neither this step nor a later one can see."""
        layer, count = call.layer, call.key.shape[2]
        new = [call.key, call.value, self.past_length + torch.arange(count)]
        if layer in self.history:
            old = self.history[layer]
            alive = (old[2] > self.past_length - window) | (old[2] < sinks)
            if not bool(alive.all()):
                old = [old[0][:, :, alive], old[1][:, :, alive], old[2][alive]]
            new = [torch.cat((a, b), dim) for a, b, dim in zip(old, new, (2, 2, 0), strict=True)]
        self.history[layer] = new
        return tuple(new)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values kept."""
        return sum(x.nbytes for parts in self.history.values() for x in parts[:2])


def _attend(
    call: AttentionCall,
    key: Tensor,
    value: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    plan: AttentionPlan,
    rotation: Rotation | None,
    *,
    window: int,
    sinks: int,
    reach: int,
) -> Tensor:
    """Attend with true distances inside the window; (B, H, S, D).

    A sink j outside the window appears at distance min(p, reach) − j.
    """
    distance = query_position[:, None] - key_position[None]
    local = reference.is_local(distance, window)
    far = reference.is_sink(distance, key_position[None], window, sinks)
    bias = torch.zeros(distance.shape).masked_fill(~(local | far), float("-inf"))
    if plan.alibi_slopes is not None:
        capped = query_position.clamp(max=reach)[:, None] - key_position
        bias = bias - plan.alibi_slopes[:, None, None] * torch.where(far, capped, distance)
    two_rotations = rotation is not None and sinks > 0
    if not two_rotations and not plan.softcap and call.sink_logits is None:
        query = call.query
        if rotation is not None:
            query = _turn(query, query_position - query_position[0], rotation)
            key = _turn(key, key_position - query_position[0], rotation)
        plain = len(query_position) == len(key_position) <= window and plan.alibi_slopes is None
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None if plain else bias.to(query.dtype),
            is_causal=plain, scale=call.scale, enable_gqa=True,
        )  # fmt: skip
    groups = call.query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = _products(call.query, key, query_position, key_position, rotation, reach, sinks)
    logits = logits * call.scale
    if plan.softcap:
        logits = plan.softcap * torch.tanh(logits / plan.softcap)
    logits = logits + bias
    if call.sink_logits is None:
        return logits.softmax(-1) @ value
    extra = call.sink_logits.float()[:, None, None].expand(*logits.shape[:3], 1)
    return torch.cat((logits, extra), -1).softmax(-1)[..., :-1] @ value


def _products(
    query: Tensor,
    key: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    rotation: Rotation | None,
    reach: int,
    sinks: int,
) -> Tensor:
    """Rotated queries times rotated keys (B, H, S, M); sinks, the first keys, by their place."""
    if rotation is None:
        return query @ key.transpose(-1, -2)
    base = query_position[0]
    local = _turn(query, query_position - base, rotation) @ _turn(
        key, key_position - base, rotation
    ).transpose(-1, -2)
    count = int((key_position < sinks).sum())
    if not count:
        return local
    # Both at their places in the cache; where nothing is evicted that is the true position.
    placed = _turn(query, query_position.clamp(max=reach), rotation)
    early = _turn(key[:, :, :count], key_position[:count], rotation)
    inside = (query_position <= reach)[:, None]
    first = torch.where(inside, local[..., :count], placed @ early.transpose(-1, -2))
    return torch.cat((first, local[..., count:]), -1)


def _turn(x: Tensor, position: Tensor, rotation: Rotation) -> Tensor:
    angle = position[:, None].double() * rotation.inv_freq.double()
    cos, sin = angle.cos() * rotation.attention_factor, angle.sin() * rotation.attention_factor
    return reference.rotate(x, cos.float(), sin.float(), interleaved=rotation.interleaved)
