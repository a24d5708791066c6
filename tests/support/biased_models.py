"""Random models whose keys have a large bias, as Qwen2's may."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.support.tiny_models import save_tokenizer


def save_qwen2(folder: Path, norm: float) -> Path:
    """Write a random Qwen2 with a bias of a norm in each key/value head, in a slow dimension."""
    config = Qwen2Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 6
            layer.self_attn.k_proj.weight *= 6
            bias = torch.zeros(2, 16)
            bias[:, 7] = norm
            layer.self_attn.k_proj.bias.copy_(bias.flatten())
    model.save_pretrained(folder)
    save_tokenizer(folder, 131)
    return folder
