"""Small seeded models on disk, made by the tests that need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 29,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 29,
    },
}


def llama_config(**changes: Any) -> LlamaConfig:
    """A Llama of odd sizes: 3 layers, 6 query and 2 key/value heads, vocabulary 131."""
    settings: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 60,
        "intermediate_size": 92,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 29,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": ROPE_SCALINGS["default"],
    }
    return LlamaConfig(**{**settings, **changes})


def save_llama(folder: Path, *, seed: int = 0, shard: str | None = None, **changes: Any) -> Path:
    """Write a random Llama as Hugging Face does, and return its folder.

    Args:
        shard: largest shard, such as "100KB", for a sharded checkpoint.
        changes: of `llama_config`, or `dtype` of the stored weights.
    """
    dtype = changes.pop("dtype", torch.float32)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**changes)).to(dtype)
    sharding = {"max_shard_size": shard} if shard else {}
    model.save_pretrained(folder, **sharding)
    save_tokenizer(folder, model.config.vocab_size)
    return folder


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a word-level tokenizer with words w0, w1, …"""
    vocab = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
