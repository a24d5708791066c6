"""Tiny checkpoints that other tools turn into ONNX models, to rewrite those.

Sizes are those that every tool takes: onnxruntime's GroupQueryAttention wants rotation tables whose
width is a multiple of 8, its int4 products rows of a multiple of 32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.support import families
from benchmarks.support.checkpoints import write_tokenizer
from benchmarks.support.families import make_random
from benchmarks.support.quantised_checkpoints import random_mxfp4_experts

# A layer's own window in the models that have one, and how far positions go.
SLIDING, POSITIONS, HEAD_DIM = 11, 128, 16
VOCABULARY = families.SIZES["vocab_size"]
SIZES: dict[str, Any] = {
    **families.SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": POSITIONS,
}
_ALTERNATE = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": SLIDING,
}
_TWO_ROTATIONS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 37,
}
_GPT_OSS = {
    **_ALTERNATE,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "rope_parameters": _YARN,
}
MXFP4_EXPERTS = "gpt_oss_mxfp4"
# Name → transformers' model_type, settings beside SIZES or, where it names its own, instead.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": SLIDING}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {**_ALTERNATE, "attn_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**_ALTERNATE, "rope_parameters": _TWO_ROTATIONS}),
    # Its original length makes genai choose one table of rotations, not two.
    "phi3": ("phi3", {"original_max_position_embeddings": POSITIONS}),
    "phi3_long": (
        "phi3",
        {
            "rope_parameters": _LONG,
            "original_max_position_embeddings": _LONG["original_max_position_embeddings"],
        },
    ),
    "gpt_oss": ("gpt_oss", _GPT_OSS),
    # Its experts as the hub has them: genai's int4 is made of those only.
    MXFP4_EXPERTS: ("gpt_oss", _GPT_OSS),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
}


def save_checkpoint(name: str, folder: Path, seed: int = 0) -> Path:
    """Write one of CHECKPOINTS, random in every parameter, with a tokenizer; return its folder."""
    model_type, changes = CHECKPOINTS[name]
    settings = changes if "n_layer" in changes else {**SIZES, **changes}
    config = CONFIG_MAPPING[model_type](**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    make_random(model, ())
    model.save_pretrained(folder)
    if name == MXFP4_EXPERTS:
        random_mxfp4_experts(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder
