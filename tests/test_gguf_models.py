"""Models in GGUF files: equal to the models that they were written from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.support import own_families
from benchmarks.support.families import CASES, FamilyCase
from benchmarks.support.gguf_files import save_gguf
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.tensors.gguf_blocks import readable_types
from tests.support.tiny_models import ROPE_SCALINGS

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
    *(
        "gpt_oss",
        "granite",
        "granitemoe",
        "llama",
        "minimax_m2",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
    ),
    *("olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("minimax_m2", "seed_oss", "smollm3", "stablelm", "starcoder2"),
]
# transformers counts the tokens; it takes the name for the architecture of some.
VOCABULARY = {
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(131)],
    "tokenizer.ggml.model": "llama",
    "general.name": "tiny",
}
OWN = ["bloom", "falcon-7b", "falcon-40b", "mpt"]
# Architectures and types that transformers loads from GGUF itself.
LOADED = ["gemma2", "gemma3_text", "llama", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]
LOADED += ["nemotron", "stablelm", "starcoder2"]
# Sizes that transformers does not read, but takes to be these.
UNREAD = {
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"moe_intermediate_size": 768},
}
TYPES = [name for name in readable_types() if name not in ("F32", "NVFP4", "IQ1_S", "IQ1_M")]
# Rows of whole blocks of every type.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def changed(name: str) -> FamilyCase:
    case = BY_NAME[name]
    return replace(case, changes={**case.changes, **CHANGED.get(name, {})})


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(3, 31)[None] * 7 % 131
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def read(path: Path) -> torch.nn.Module:
    return load_model(open_checkpoint(open_source(path)), torch.float32, "eager")


def stock(folder: Path, **settings: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        **settings,
    )


def gap(found: torch.nn.Module, wanted: torch.nn.Module) -> float:
    """Return the largest difference of a logit, relative to their range."""
    ours, theirs = logits(found), logits(wanted)
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_from_gguf_is_the_one_it_was_written_from(name, tmp_path):
    folder = changed(name).save(tmp_path / "m")
    assert gap(read(save_gguf(folder, tmp_path / "m.gguf")), stock(folder)) <= 2e-6


@pytest.mark.parametrize("name", OWN)
def test_so_is_one_of_a_family_of_its_own(name, tmp_path):
    changes = {"attn_config": {"clip_qkv": 1.7}} if name == "mpt" else {}
    folder = own_families.save(name, tmp_path / "m", **changes)
    assert gap(read(save_gguf(folder, tmp_path / "m.gguf")), stock(folder)) <= 2e-6


@pytest.mark.parametrize("name", LOADED)
def test_a_model_is_the_one_that_transformers_loads_from_the_file(name, tmp_path):
    case = changed(name)
    folder = replace(case, changes={**case.changes, **UNREAD.get(name, {})}).save(tmp_path / "m")
    path = save_gguf(folder, tmp_path / "m.gguf", metadata=VOCABULARY)
    wanted = stock(tmp_path, gguf_file=path.name)
    found = read(path)
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_of_every_type_is_the_one_that_transformers_loads(kind, tmp_path):
    folder = replace(BY_NAME["llama"], changes=WIDE).save(tmp_path / "m")
    path = save_gguf(folder, tmp_path / "m.gguf", kind, metadata=VOCABULARY)
    wanted = stock(tmp_path, gguf_file=path.name)
    assert gap(read(path), wanted) <= 2e-6
    assert 0.01 < float(logits(wanted).std()) < 1000


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_a_scaling_of_rotations_is_read(kind, tmp_path):
    rope = dict(ROPE_SCALINGS[kind])
    if kind == "llama3":
        rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0, "factor": 32.0}
    folder = replace(BY_NAME["llama"], changes={"rope_parameters": rope}).save(tmp_path / "m")
    model = read(save_gguf(folder, tmp_path / "m.gguf"))
    assert gap(model, stock(folder)) <= 2e-6
    assert model.config.rope_parameters["rope_type"] == kind


def test_factors_that_no_known_scaling_makes_are_kept_as_they_are(tmp_path):
    rope = {**ROPE_SCALINGS["llama3"], "factor": 3.3, "original_max_position_embeddings": 77}
    folder = replace(BY_NAME["llama"], changes={"rope_parameters": rope}).save(tmp_path / "m")
    model = read(save_gguf(folder, tmp_path / "m.gguf"))
    assert gap(model, stock(folder)) <= 2e-6
    assert model.config.rope_parameters["rope_type"] == "longrope"


def test_factors_for_short_and_long_texts_are_read(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    }
    changes = {"rope_parameters": rope, "max_position_embeddings": 64}
    case = replace(BY_NAME["phi3"], changes={**changes, "original_max_position_embeddings": 16})
    folder = case.save(tmp_path / "m")
    assert gap(read(save_gguf(folder, tmp_path / "m.gguf")), stock(folder)) <= 2e-6


def test_biases_of_rotated_projections_are_put_in_order(tmp_path):
    changes = {"attention_bias": True, "mlp_bias": True}
    folder = replace(BY_NAME["llama"], changes=changes).save(tmp_path / "m")
    assert gap(read(save_gguf(folder, tmp_path / "m.gguf")), stock(folder)) <= 2e-6


def test_blocks_of_rotated_projections_are_kept_as_they_are_stored(tmp_path):
    folder = replace(BY_NAME["llama"], changes=WIDE).save(tmp_path / "m")
    path = save_gguf(folder, tmp_path / "m.gguf", "Q4_0")
    checkpoint = open_checkpoint(open_source(path))
    tensor = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
    raw = tensor.raw_rows(0, tensor.num_rows)
    assert tensor.ggml_type == "Q4_0"
    assert raw.shape == (256, 256 // 32 * 18)
    wanted = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_0))
    assert torch.equal(tensor.rows(0, 256), wanted)
    stored = stock(folder).model.layers[0].self_attn.q_proj.weight.detach()
    assert torch.nn.functional.cosine_similarity(wanted, stored).min() > 0.98
