"""The exported step: a model's own code, with one attention operator and one cache per layer.

`OperatorStep` computes attention calls by the operator over bounded caches. It is checked against
`history.HistoryStep`, which computes the specification from explicit keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lminf_export.models.base import AttentionCall, AttentionPlan, Rotation, Step, use_step
from lminf_export.operator import positions, torch_operator
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.rope import rotary_tables


class PlanTables(nn.Module):
    """The constants of a plan as buffers: digit tables, limit rows, slopes.

    Layers that share a rotation and a limit share the rows.

    Args:
        plan: how the layers attend.
        dtype: the model's type, for the sinks of layers that have none.
    """

    def __init__(self, plan: AttentionPlan, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.plan = plan
        for index, rotation in enumerate(plan.rotations):
            limits = sorted(
                {
                    layer.distance_limit
                    for layer, kind in zip(plan.layers, plan.layer_rotation, strict=True)
                    if kind == index
                }
            )
            for limit in limits:
                tables = rotary_tables(rotation.inv_freq, limit, rotation.attention_factor)
                self.register_buffer(f"limit_cos_{index}_{limit}", tables.limit_cos)
                self.register_buffer(f"limit_sin_{index}_{limit}", tables.limit_sin)
            self.register_buffer(f"cos_{index}", tables.cos)
            self.register_buffer(f"sin_{index}", tables.sin)
        heads = plan.num_attention_heads
        slopes = torch.zeros(heads) if plan.alibi_slopes is None else plan.alibi_slopes.float()
        self.register_buffer("alibi_slopes", slopes)
        self.register_buffer("no_sink_logits", torch.full((heads,), float("-inf")))
        self.register_buffer("no_rotation", torch.zeros(1, 1, 1))
        self.register_buffer("no_limit", torch.zeros(1))
        for layer in plan.layers:
            if not layer.num_sink_tokens:
                shape = (1, layer.num_kv_heads, 1, layer.head_dim)
                self.register_buffer(_no_sinks_name(layer), torch.zeros(shape, dtype=dtype))

    def rows(self, position: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin (B, S, R/2) of each rotation at given positions (B, S)."""
        return [
            positions.rotary_rows(
                position, self.get_buffer(f"cos_{k}"), self.get_buffer(f"sin_{k}")
            )
            for k in range(len(self.plan.rotations))
        ]

    def limit_row(self, rotation: int, limit: int) -> tuple[Tensor, Tensor]:
        """cos and sin (R/2,) at the distance limit."""
        name = f"{rotation}_{limit}"
        return self.get_buffer(f"limit_cos_{name}"), self.get_buffer(f"limit_sin_{name}")

    def no_rotation_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cos, sin and their limit rows for a layer without rotation."""
        row, limit = self.get_buffer("no_rotation"), self.get_buffer("no_limit")
        return row, row, limit, limit

    def no_table(self) -> Tensor:
        """The digit table of a layer without rotation."""
        return self.get_buffer("no_rotation")[0]

    def no_sinks(self, layer: LayerSpec) -> Tensor:
        """(1, G, 1, D) zeros for a layer without sink tokens."""
        return self.get_buffer(_no_sinks_name(layer))


def _no_sinks_name(layer: LayerSpec) -> str:
    return f"no_sinks_{layer.num_kv_heads}_{layer.head_dim}"


class OperatorStep:
    """Answers attention by `lminf::lambda_attention` over bounded caches.

    Rings of int8 are recognised by their type; their scales stand behind the sinks.

    Attributes:
        present: for each layer its new caches, in the order of `GraphContract.layer_caches`.
    """

    def __init__(
        self,
        tables: PlanTables,
        input_ids: Tensor,
        past_length: Tensor,
        new_length: Tensor,
        caches: list[list[Tensor]],
    ) -> None:
        self.tables, self.plan, self.caches = tables, tables.plan, caches
        self.past_length, self.new_length = past_length, new_length
        self.query_position = positions.token_positions(past_length, input_ids)
        self.rows = tables.rows(self.query_position)
        rings: dict[int, Tensor] = {}
        for layer, cache in zip(self.plan.layers, caches, strict=True):
            rings.setdefault(layer.ring_capacity, cache[0])  # the first: it is always there
        self.slots = {
            capacity: positions.slot_positions(past_length, new_length, ring)
            for capacity, ring in rings.items()
        }
        self.present: dict[int, list[Tensor]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Write the layer's cache and attend over it."""
        layer = call.layer
        assert layer not in self.present, f"layer {layer} attends twice"
        spec, caches = self.plan.layers[layer], self.caches[layer]
        int8_cache = caches[0].dtype == torch.int8
        caches, scales = (caches[:-2], caches[-2:]) if int8_cache else (caches, [])
        if not spec.num_sink_tokens:
            caches = [*caches, *(self.tables.no_sinks(spec),) * 2]
        operator, own = torch_operator.lambda_attention, scales
        if int8_cache:
            operator = torch_operator.lambda_attention_int8_cache
            own = [*scales, *self._key_bias(call)]
        output, *present = operator(
            call.query,
            call.key,
            call.value,
            *caches,
            self.past_length,
            self.new_length,
            self.query_position,
            self.slots[spec.ring_capacity],
            *self._rotation(layer),
            self.tables.get_buffer("alibi_slopes"),
            self._sink_logits(call),
            *own,
            num_sink_tokens=spec.num_sink_tokens,
            window_size=spec.window_size,
            distance_limit=spec.distance_limit,
            scale=call.scale,
            softcap=self.plan.softcap,
            rotary_dim=self._rotary_dim(layer),
            rotary_interleaved=self._interleaved(layer),
        )
        self.present[layer] = present if spec.num_sink_tokens else [*present[:2], *present[4:]]
        return output

    def _key_bias(self, call: AttentionCall) -> list[Tensor]:
        """Return what stays out of an int8 ring, and the tables that rotate it; none without."""
        bias = call.key_bias() if self.plan.keeps_bias_out(call.layer) else None
        if bias is None:
            return []
        index = self.plan.layer_rotation[call.layer]
        if index is None:
            return [bias, *(self.tables.no_table(),) * 2]
        return [bias, *(self.tables.get_buffer(f"{name}_{index}") for name in ("cos", "sin"))]

    def _sink_logits(self, call: AttentionCall) -> Tensor:
        if call.sink_logits is None:
            return self.tables.get_buffer("no_sink_logits")
        return call.sink_logits.to(torch.float32)

    def _kind(self, layer: int) -> Rotation | None:
        index = self.plan.layer_rotation[layer]
        return None if index is None else self.plan.rotations[index]

    def _rotary_dim(self, layer: int) -> int:
        kind = self._kind(layer)
        return kind.rotary_dim if kind else 0

    def _interleaved(self, layer: int) -> bool:
        kind = self._kind(layer)
        return bool(kind and kind.interleaved)

    def _rotation(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = self.plan.layer_rotation[layer]
        if index is None:
            return self.tables.no_rotation_rows()
        limit = self.plan.layers[layer].distance_limit
        cos, sin = self.rows[index]
        return (cos, sin, *self.tables.limit_row(index, limit))


def run(model: nn.Module, input_ids: Tensor, step: Step, logits_index: Tensor) -> Tensor:
    """Run a patched model of transformers; return the logits of some rows.

    Args:
        model: the causal language model.
        input_ids: (B, S) int64.
        step: computes its attention.
        logits_index: (B, K) int64, rows of S.

    Returns:
        (B, K, V) logits in the model's type.
    """

    def keep_rows(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0]
        index = logits_index[:, :, None].expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index),)

    # A hook before the vocabulary projection keeps a family's own steps around it.
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]  # of PreTrainedModel
    hook = head.register_forward_pre_hook(keep_rows)
    try:
        with use_step(step):
            return model(input_ids=input_ids, use_cache=False).logits
    finally:
        hook.remove()


class LambdaModel(nn.Module):
    """The module that is traced: tokens and caches in, logits and caches out.

    Args:
        model: a patched causal language model of transformers.
        plan: how its layers attend.
        tables: the plan's constants; made from the plan where not given.
    """

    def __init__(
        self, model: nn.Module, plan: AttentionPlan, tables: PlanTables | None = None
    ) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        self.tables = tables or PlanTables(plan)

    def forward(
        self,
        input_ids: Tensor,
        past_length: Tensor,
        new_length: Tensor,
        logits_index: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """One step: see `GraphContract.inputs` and `outputs`."""
        step = OperatorStep(self.tables, input_ids, past_length, new_length, self._by_layer(caches))
        logits = run(self.model, input_ids, step, logits_index).to(torch.float32)
        present = [x for layer in range(len(self.plan.layers)) for x in step.present[layer]]
        return (logits, *present)

    def _by_layer(self, caches: list[Tensor]) -> list[list[Tensor]]:
        flat = iter(caches)
        scales = 2 if caches[0].dtype == torch.int8 else 0
        kinds = ((4 if layer.num_sink_tokens else 2) + scales for layer in self.plan.layers)
        return [[next(flat) for _ in range(count)] for count in kinds]
