"""Λ-attention over a whole sequence at once, in float64, around models without the interface.

Independent of the package: the model's own code runs as it is, projections, softmax and all. With
ALiBi only its bias table and its mask are replaced, by explicit n × n tables; where it rotates, its
attention gets queries and keys as projected and computes each row of logits from a table of
distances.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

LONG = 4096  # more positions than any test has, for the stock code's own tables
HIDDEN = -1e30


@dataclass(frozen=True)
class Rule:
    """The keys every layer sees: a window (own key included), sinks, and the distance they get."""

    window: int
    sinks: int
    limit: int

    def tables(self, count: int) -> tuple[Tensor, Tensor]:
        """Return which keys (n, n) are seen and at which distance (n, n) float64."""
        position = torch.arange(count)
        true = position[:, None] - position[None, :]
        local = (true >= 0) & (true < self.window)
        sink = (true >= self.window) & (position < self.sinks)[None, :]
        return local | sink, torch.where(sink, self.limit, true).double()


def paper_slopes(heads: int) -> Tensor:
    """Slopes (H,) float64 as the ALiBi paper gives them, also for no power of two."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-8 * (i + 0.5) / below) for i in range(heads - below)]
    return torch.tensor(slopes, dtype=torch.float64)


@torch.no_grad()
def own_logits(folder: Path, rule: Rule, tokens: Tensor) -> Tensor:
    """Logits (T, V) float64 of tokens (T,) int64 for a checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    for name in ("n_positions", "max_seq_len"):
        if hasattr(config, name):
            setattr(config, name, LONG)
    eager = "eager" if config.model_type in ("gptj", "codegen") else None  # as the function below
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float64, attn_implementation=eager
    ).eval()
    code = sys.modules[type(model).__module__]
    replace = _REPLACEMENTS[config.model_type]
    with ExitStack() as stack:
        for owner, name, value in replace(code, config, rule, len(tokens)):
            stack.enter_context(mock.patch.object(owner, name, value))
        return model(input_ids=tokens[None], use_cache=False).logits[0]


def _mpt(code: Any, config: Any, rule: Rule, count: int) -> list[tuple[Any, str, Any]]:
    seen, distance = rule.tables(count)
    bias = -paper_slopes(config.n_heads)[:, None, None] * distance
    return [
        (code, "build_mpt_alibi_tensor", _giving(bias)),
        (code, "create_causal_mask", _giving(~seen)),
    ]


def _bloom(code: Any, config: Any, rule: Rule, count: int) -> list[tuple[Any, str, Any]]:
    seen, distance = rule.tables(count)
    bias = -paper_slopes(config.n_head)[:, None, None] * distance
    heads, none = config.n_head, torch.zeros(())
    return [
        (code, "_get_alibi_slopes", _giving(none.expand(heads)))
        if hasattr(code, "_get_alibi_slopes")  # from transformers 5.14 on
        else (code, "build_alibi_tensor", _giving(none.double().expand(heads, 1, count))),
        (code, "create_causal_mask", _giving(torch.where(seen, bias, HIDDEN)[None])),
        (code.F, "softmax", lambda x, dim, dtype: x.softmax(dim)),  # not in float32
    ]


def _falcon(code: Any, config: Any, rule: Rule, count: int) -> list[tuple[Any, str, Any]]:
    seen, distance = rule.tables(count)
    if config.alibi:
        bias = -paper_slopes(config.num_attention_heads)[:, None, None] * distance
        mask = torch.where(seen, 0.0, HIDDEN)[None, None].double()
        return [
            (code, "build_alibi_tensor", _giving(bias)),
            (code, "create_causal_mask", _giving(mask)),
        ]
    dim = config.head_dim
    inv_freq = _inv_freq(config.rope_parameters["rope_theta"], dim)

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        logits = _turned_logits(query, key, inv_freq, distance, _turn_halves) * dim**-0.5
        return logits.masked_fill(~seen, HIDDEN).softmax(-1) @ value

    return [
        (code, "apply_rotary_pos_emb", lambda query, key, *_: (query, key)),
        (torch.nn.functional, "scaled_dot_product_attention", attention),
    ]


def _gptj(code: Any, config: Any, rule: Rule, count: int) -> list[tuple[Any, str, Any]]:
    seen, distance = rule.tables(count)
    inv_freq = _inv_freq(10000.0, config.rotary_dim)

    def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        logits = _turned_logits(query, key, inv_freq, distance, _turn_pairs)
        scale = query.shape[-1] ** -0.5
        weights = (logits * scale).masked_fill(~seen, HIDDEN).softmax(-1)
        return weights @ value, weights

    def interface(*given: Any, **__: Any) -> Any:
        mixed, weights = attention(*given)
        return mixed.transpose(1, 2).contiguous(), weights

    owner = getattr(code, "GPTJAttention", None) or code.CodeGenAttention
    is_old = hasattr(owner, "_attn")  # a method up to transformers 5.23, a function since
    return [
        (code, "apply_rotary_pos_emb", lambda x, *_: x),
        (owner, "_attn", attention) if is_old else (code, "eager_attention_forward", interface),
    ]


_REPLACEMENTS: dict[str, Callable[..., list[tuple[Any, str, Any]]]] = {
    "mpt": _mpt,
    "bloom": _bloom,
    "falcon": _falcon,
    "gptj": _gptj,
    "codegen": _gptj,
}


def _giving(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _inv_freq(theta: float, dim: int) -> Tensor:
    """The frequencies as float32 has them: the model was trained with those."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return (1.0 / theta**exponent).double()


def _turned_logits(
    query: Tensor, key: Tensor, inv_freq: Tensor, distance: Tensor, turn: Any
) -> Any:
    """Products (B, H, n, n) of queries turned by the distance to each key."""
    rows = []
    for row in range(query.shape[2]):
        angle = distance[row][:, None] * inv_freq
        turned = turn(
            query[:, :, row, None].expand(-1, -1, key.shape[2], -1), angle.cos(), angle.sin()
        )
        rows.append((turned * key).sum(-1))
    return torch.stack(rows, 2)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    as_complex = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    return torch.cat((as_complex.real, as_complex.imag), -1)


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = 2 * cos.shape[-1]
    pairs = torch.view_as_complex(x[..., :size].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    return torch.cat((turned, x[..., size:]), -1)
