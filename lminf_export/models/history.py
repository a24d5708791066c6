"""The reference step: attention by the specification, with explicit keys and no cache slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lminf_export.models.base import AttentionCall, AttentionPlan
from lminf_export.models.rounded_rings import Rings
from lminf_export.operator import reference

# Logits of some heads that are in memory together: 16 MiB in float64, with a few copies.
_LOGIT_ELEMENTS = 2**21


class HistoryStep:
    """Answers attention by `reference.attend_by_distance` over an explicit history.

    Keeps unrotated keys with their positions; drops what no later query can see. A model that
    computes all tokens in one layer before the next calls `restart` at each.

    Args:
        plan: how the layers attend.
        batch_size: B.
        rounded: what rings make of keys and values; None for rings that hold them as they are.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        batch_size: int = 1,
        *,
        rounded: Rings | None = None,
    ) -> None:
        self.plan, self.rounded = plan, rounded
        self.past_length = torch.zeros(batch_size, dtype=torch.int64)
        self.new_length = self.past_length
        self.history: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, new_length: Tensor) -> None:
        """Advance past the last chunk and announce the next: (B,) int64 real tokens."""
        self.past_length = self.past_length + self.new_length
        self.new_length = new_length

    def restart(self) -> None:
        """Forget everything: the next chunk is the first again."""
        self.past_length = self.new_length = torch.zeros_like(self.past_length)
        self.history.clear()

    def attend(self, call: AttentionCall) -> Tensor:
        """Append to the layer's history and attend over all of it that is visible."""
        layer, key, value = call.layer, call.key, call.value
        spec = self.plan.layers[layer]
        steps = torch.arange(key.shape[2])
        query_position = self.past_length[:, None] + steps
        is_real = steps < self.new_length[:, None]
        position = query_position.masked_fill(~is_real, reference.EMPTY)
        if layer in self.history:
            old = self.history[layer]
            key, value = torch.cat((old[0], key), 2), torch.cat((old[1], value), 2)
            position = torch.cat((old[2], position), 1)
        output = self._attended(replace(call, key=key, value=value), query_position, position)
        after = (self.past_length + self.new_length)[:, None]
        alive = (position > after - spec.window_size) | (position < spec.num_sink_tokens)
        keep = (alive & (position >= 0)).any(0)
        self.history[layer] = key[:, :, keep], value[:, :, keep], position[:, keep]
        return output

    def _roundings(self, call: AttentionCall, heads: slice, position: Tensor) -> dict[str, Any]:
        """Return what `reference.attend_by_distance` must know of rings that round."""
        if self.rounded is None:
            return {}
        out = self.plan.keeps_bias_out(call.layer) and not self.rounded.keeps_bias
        bias = call.key_bias() if out else None
        own = None if bias is None else bias[heads]
        key, value = self.rounded.of_layer(call.layer, heads, position, own)
        return {"rounded": key, "rounded_value": value, "key_bias": own}

    def _attended(self, call: AttentionCall, query_position: Tensor, position: Tensor) -> Tensor:
        """Attend over all keys of a call, a few key/value heads with their queries at a time."""
        plan, spec = self.plan, self.plan.layers[call.layer]
        index = plan.layer_rotation[call.layer]
        rotation = None if index is None else plan.rotations[index]
        count, groups = call.key.shape[1], call.query.shape[1] // call.key.shape[1]
        elements = groups * call.query.shape[2] * call.key.shape[2]
        step = max(1, _LOGIT_ELEMENTS // max(1, elements))
        outputs = []
        for start in range(0, count, step):
            part = slice(start, start + step)
            heads = slice(start * groups, (start + step) * groups)
            outputs.append(
                reference.attend_by_distance(
                    call.query[:, heads],
                    call.key[:, part],
                    call.value[:, part],
                    query_position,
                    position,
                    window_size=spec.window_size,
                    num_sink_tokens=spec.num_sink_tokens,
                    distance_limit=spec.distance_limit,
                    scale=call.scale,
                    inv_freq=rotation.inv_freq if rotation else None,
                    attention_factor=rotation.attention_factor if rotation else 1.0,
                    interleaved=bool(rotation and rotation.interleaved),
                    softcap=plan.softcap,
                    alibi_slopes=None if plan.alibi_slopes is None else plan.alibi_slopes[heads],
                    sink_logits=None if call.sink_logits is None else call.sink_logits[heads],
                    **self._roundings(call, part, position),
                )
            )
        return torch.cat(outputs, 1)
