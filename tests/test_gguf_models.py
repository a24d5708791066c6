"""Models in GGUF files: equal to the models that they were written from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.support.families import CASES, FamilyCase
from benchmarks.support.gguf_files import save_gguf
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source

BY_NAME = {case.model_type: case for case in CASES}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}
# Where GGUF has no place for a setting of the family's case.
TIED = {"tie_word_embeddings": True}
CHANGED = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "phi": {"qk_layernorm": False},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "cohere": TIED,
    "cohere2": TIED,
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt_oss": {
        "swiglu_limit": 7.0,
        "rope_parameters": {
            **PLAIN["rope_parameters"],
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "truncate": False,
        },
    },
}
NAMES = [
    *("arcee", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "gpt_neox"),
    *("gpt_oss", "granite", "granitemoe", "llama", "mistral", "mixtral", "nemotron", "olmo"),
    *("olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("seed_oss", "smollm3", "stablelm", "starcoder2"),
]
HIDDEN_64 = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}


def changed(name: str) -> FamilyCase:
    case = BY_NAME[name]
    return replace(case, changes={**case.changes, **CHANGED.get(name, {})})


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(3, 43)[None] * 7 % 131
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def read(path: Path) -> torch.nn.Module:
    return load_model(open_checkpoint(open_source(path)), torch.float32, "eager")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_from_gguf_is_the_one_it_was_written_from(name, tmp_path):
    folder = changed(name).save(tmp_path / "m")
    path = save_gguf(folder, tmp_path / "m.gguf")
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    wanted, found = logits(stock), logits(read(path))
    assert (found - wanted).abs().max() <= 2e-6 * (wanted.max() - wanted.min())
