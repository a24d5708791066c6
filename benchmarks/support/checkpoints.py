"""Llama-shaped checkpoints of random weights, written shard by shard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "100m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    # TinyLlama's.
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


_POOL = 2**24 + 43  # a prime: no row repeats at the same place


def write_checkpoint(
    folder: Path, shape: dict[str, Any], dtype: torch.dtype, max_position_embeddings: int
) -> int:
    """Write config.json, a tokenizer and one shard a layer; return the number of parameters."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **shape,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    h, f = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * h // config.num_attention_heads
    weight_map: dict[str, str] = {}
    count = 0
    # Drawing billions of numbers takes longer than anything measured on them: they repeat.
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(_POOL).uniform_(-0.035, 0.035, generator=generator).to(dtype)

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        tensors = {}
        for number, (key, size) in enumerate(shapes.items(), start=len(weight_map)):
            wanted = math.prod(size)
            rolled = pool.roll(-7919 * number)
            tensor = rolled.repeat(-(-wanted // _POOL))[:wanted].reshape(size)
            tensors[key] = tensor + 1 if len(size) == 1 else tensor.contiguous()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        count += sum(t.numel() for t in tensors.values())

    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        save(
            f"model-{i:05}.safetensors",
            {
                p + "self_attn.q_proj.weight": (h, h),
                p + "self_attn.k_proj.weight": (kv, h),
                p + "self_attn.v_proj.weight": (kv, h),
                p + "self_attn.o_proj.weight": (h, h),
                p + "mlp.gate_proj.weight": (f, h),
                p + "mlp.up_proj.weight": (f, h),
                p + "mlp.down_proj.weight": (h, f),
                p + "input_layernorm.weight": (h,),
                p + "post_attention_layernorm.weight": (h,),
            },
        )
    save("model-embed.safetensors", {"model.embed_tokens.weight": (config.vocab_size, h)})
    save(
        "model-head.safetensors",
        {"model.norm.weight": (h,), "lm_head.weight": (config.vocab_size, h)},
    )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a word-level tokenizer with words w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
