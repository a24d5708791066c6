"""A Llama with Λ-attention over a whole sequence at once, in float64, written from the paper.

Independent of the package: no cache, no ring, no code of transformers or of reference.py; an
explicit n × n table of distances and one softmax.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def lambda_llama_logits(
    folder: Path,
    config,
    inv_freq: Tensor,
    factor: float,
    tokens: Tensor,
    *,
    window: int,
    sinks: int,
    limit: int,
) -> Tensor:
    """Logits (T, V) float64 for tokens (T,) of a Llama checkpoint with Λ-attention."""
    w = {}
    for path in sorted(folder.glob("*.safetensors")):
        w.update({name: tensor.double() for name, tensor in load_file(path).items()})
    hidden = w["model.embed_tokens.weight"][tokens]
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        normed = _norm(hidden, w[p + "input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (
            _linear(normed, w, f"{p}self_attn.{name}_proj").unflatten(-1, (-1, dim)).transpose(0, 1)
            for name in "qkv"
        )
        k, v = (x.repeat_interleave(heads // groups, dim=0) for x in (k, v))
        mixed = _attend(q, k, v, inv_freq.double(), factor, window, sinks, limit)
        hidden = hidden + _linear(mixed.transpose(0, 1).flatten(1), w, p + "self_attn.o_proj")
        normed = _norm(hidden, w[p + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = torch.nn.functional.silu(_linear(normed, w, p + "mlp.gate_proj"))
        up = _linear(normed, w, p + "mlp.up_proj")
        hidden = hidden + _linear(gate * up, w, p + "mlp.down_proj")
    hidden = _norm(hidden, w["model.norm.weight"], config.rms_norm_eps)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return hidden @ head.T


def _attend(q, k, v, inv_freq, factor, window, sinks, limit):
    count = q.shape[1]
    position = torch.arange(count)
    distance = position[:, None] - position[None, :]
    logits = torch.empty(q.shape[0], count, count, dtype=torch.float64)
    for row in range(count):
        seen = distance[row].clamp(max=limit).double()
        seen = torch.where(distance[row] >= window, float(limit), seen)
        angle = seen[:, None] * inv_freq
        cos = torch.cat((angle.cos(), angle.cos()), -1)
        sin = torch.cat((angle.sin(), angle.sin()), -1)
        half = q.shape[-1] // 2
        query = q[:, row, None, :]
        turned = torch.cat((-query[..., half:], query[..., :half]), -1)
        logits[:, row] = ((query * cos + turned * sin) * k).sum(-1)
    local = (distance >= 0) & (distance < window)
    sink = (distance >= window) & (position < sinks)[None, :]
    logits = logits * factor**2 * q.shape[-1] ** -0.5
    return logits.masked_fill(~(local | sink), float("-inf")).softmax(-1) @ v


def _norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _linear(x, w, name):
    bias = w.get(name + ".bias", 0.0)
    return x @ w[name + ".weight"].T + bias
