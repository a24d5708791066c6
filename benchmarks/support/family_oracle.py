"""Λ-attention over a whole sequence at once, in float64, around any model of transformers.

Independent of the package: the model's own code runs as it is, rotary embedding included, on
all tokens, with every promotion to float32 made one to float64. Its attention is replaced by one
softmax over an explicit n × n table of distances. Queries and keys arrive rotated at their own
positions, which is what local logits need; for sinks the model's own rotation turns the queries
on to the limit and the keys back to zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "oracle_attention"


@dataclass(frozen=True)
class Rule:
    """The keys one layer sees: a window (own key included), sinks, and the distance they get."""

    window: int
    sinks: int
    limit: int


@torch.no_grad()
def oracle_logits(folder: Any, rules: list[Rule], tokens: Tensor) -> Tensor:
    """Logits (T, V) float64 of tokens (T,) int64 for a checkpoint, one rule for each layer."""
    turns = _Turns()

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        mixed = _attend(query, key, value, rules[module.layer_idx], turns, **settings)
        turns.use = None
        return mixed.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=NAME,
        experts_implementation="eager",
    )
    model = model.eval().double()
    with _InDouble(), turns.watching(model):
        return model(input_ids=tokens[None], use_cache=False).logits[0]


class _InDouble(TorchFunctionMode):
    """Makes every promotion to float32 one to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        keywords = {name: _double(value) for name, value in (kwargs or {}).items()}
        return func(*map(_double, args), **keywords)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass
class _Turns:
    """Knows how the current layer rotates, from watching the model's own two functions.

    Attributes:
        use: of the layer that attends next, (rotary call, apply call), or None if it has not
            rotated.
        tables: id of a cosine table → how it was made; the table is kept alive with it.
    """

    use: tuple[Any, Any] | None = None
    tables: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        code = sys.modules[type(model).__module__]
        with ExitStack() as stack:
            for module in model.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):
                    replaced = mock.patch.object(module, "forward", self._rotary(module))
                    stack.enter_context(replaced)
            apply = getattr(code, "apply_rotary_pos_emb", None)
            if apply is not None:
                replaced = mock.patch.object(code, "apply_rotary_pos_emb", self._apply(apply))
                stack.enter_context(replaced)
            yield

    def turn(self, x: Tensor, angle: Tensor) -> Tensor:
        """Rotate x (1, heads, T, D) further by angles given as positions (T,); length is kept."""
        if self.use is None:
            return x
        make, (apply, width, settings, keywords) = self.use
        cos, sin = make(x, angle[None])
        size = (cos.square() + sin.square()).sqrt()  # the attention factor
        cos, sin = cos / size, sin / size
        head, rest = x[..., :width], x[..., width:]
        turned, _ = apply(head, head, cos, sin, *settings, **keywords)
        return torch.cat((turned, rest), -1)

    def _rotary(self, module: Any) -> Any:
        forward = module.forward

        def watched(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
            extra = (layer_type,) if layer_type else ()
            tables = forward(x, position_ids, *extra)

            def make(y: Tensor, position: Tensor) -> Any:
                return forward(y, position, *extra)

            self.tables[id(tables[0])] = (make, tables)
            return tables

        return watched

    def _apply(self, apply: Any) -> Any:
        def watched(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *a: Any, **k: Any) -> Any:
            self.use = self.tables[id(cos)][0], (apply, query.shape[-1], a, k)
            return apply(query, key, cos, sin, *a, **k)

        return watched


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule,
    turns: _Turns,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    heads, groups, count = query.shape[1], key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    position = torch.arange(count, dtype=torch.float64)
    distance = position[:, None] - position
    local = (distance >= 0) & (distance < rule.window)
    sink = (distance >= rule.window) & (position < rule.sinks)
    near = query @ key.mT
    far = turns.turn(query, rule.limit - position) @ turns.turn(key, -position).mT
    logits = torch.where(sink, far, near) * (scaling or query.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~(local | sink), float("-inf"))
    if s_aux is not None:
        extra = s_aux[None, :, None, None].expand(1, heads, count, 1)
        return torch.cat((logits, extra), -1).softmax(-1)[..., :-1] @ value
    return logits.softmax(-1) @ value
