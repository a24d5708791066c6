"""One tiny model for every supported family, with what is special about the family switched on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

WINDOW, SINKS, CHUNK, SLIDING = 23, 5, 7, 11
FULL = None  # a layer that sees everything, in `FamilyCase.windows`

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


@dataclass(frozen=True)
class FamilyCase:
    """A family's tiny model and what its layers must turn out to be.

    Attributes:
        model_type: transformers' name.
        position: kind of position, for the table of models.
        special: differences of this family from a Llama, for the table of models.
        changes: settings beside SIZES.
        windows: for each layer its own window from training, or FULL.
        drop: settings of SIZES this family's configuration derives by itself.
        stock: attention implementation of transformers to compare with.
        equal_in_pairs: ends of names of weights that are equal within each rotated pair.
    """

    model_type: str
    position: str
    special: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int | None, ...] = (FULL,) * 3
    drop: tuple[str, ...] = ()
    stock: str = "eager"
    equal_in_pairs: tuple[str, ...] = ()

    def config(self) -> Any:
        """Make the configuration."""
        settings = {**SIZES, **self.changes}
        return CONFIG_MAPPING[self.model_type](
            **{name: value for name, value in settings.items() if name not in self.drop}
        )

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the model, random in every parameter, as the hub has it; return its folder."""
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            self.config(), dtype=torch.float32
        )
        make_random(model, self.equal_in_pairs)
        model.save_pretrained(folder)
        return folder


def make_random(model: PreTrainedModel, equal_in_pairs: tuple[str, ...]) -> None:
    """Add noise to parameters that start as constants, which would hide a forgotten one.

    Args:
        model: changed in place.
        equal_in_pairs: ends of names of weights whose two halves are then made equal.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and float(parameter.std()) == 0:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith(equal_in_pairs):
                first, second = parameter.chunk(2)
                second.copy_(first)


def _rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {**SIZES["rope_parameters"], **changes}}


def _two_thetas() -> dict[str, Any]:
    return {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
        }
    }


def _layers(kinds: str) -> dict[str, Any]:
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {
        "num_hidden_layers": len(kinds),
        "layer_types": [names[kind] for kind in kinds],
        "sliding_window": SLIDING,
    }


HALF_SPLIT, PARTIAL, INTERLEAVED = "rotary", "partial rotary", "interleaved rotary"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 29,
}
TWO_MSCALES = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.1],
    "long_factor": [1.0, 3.0, 5.0, 9.0, 17.0],
    "short_mscale": 1.3,
    "long_mscale": 1.6,
    "original_max_position_embeddings": 512,  # longer than any text here
}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
GROUPED_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
MIXED = (SLIDING, FULL, SLIDING)

CASES = [
    FamilyCase("llama", HALF_SPLIT),
    FamilyCase(
        "mistral",
        HALF_SPLIT,
        "every layer slides where `sliding_window` is set",
        {"sliding_window": SLIDING},
        (SLIDING,) * 3,
    ),
    FamilyCase("ministral", HALF_SPLIT, "sliding layers", _layers("sfs"), MIXED),
    FamilyCase(
        "ministral3",
        HALF_SPLIT,
        "attention temperature, frozen at 1; YaRN",
        # Longer than any text here, as nothing is frozen up to there.
        {
            **_rope(**{**YARN, "original_max_position_embeddings": 512}, llama_4_scaling_beta=0.1),
            "max_position_embeddings": 2048,
        },
    ),
    FamilyCase(
        "nanochat",
        "rotary, backwards",
        "QK-norm without weights after rotation, soft-capped logits",
        {"final_logit_softcapping": 7.0, "attention_bias": True},
    ),
    FamilyCase(
        "qwen2",
        HALF_SPLIT,
        "biased projections; layers slide from `max_window_layers` on",
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": SLIDING},
        (FULL, FULL, SLIDING),
    ),
    FamilyCase("qwen3", HALF_SPLIT, "QK-norm"),
    FamilyCase("gemma", HALF_SPLIT, "scaled embeddings", {"tie_word_embeddings": True}),
    FamilyCase(
        "gemma2",
        HALF_SPLIT,
        "soft-capped attention and logits, sliding layers, own logit scale",
        {
            **_layers("sfs"),
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 7.0,
            "query_pre_attn_scalar": 17,
            "tie_word_embeddings": True,
        },
        MIXED,
    ),
    FamilyCase(
        "gemma3_text",
        HALF_SPLIT,
        "two rotary tables, QK-norm, sliding layers",
        {**_layers("sfs"), **_two_thetas(), "query_pre_attn_scalar": 17},
        MIXED,
    ),
    FamilyCase("phi3", PARTIAL, "fused projections", _rope(partial_rotary_factor=0.6)),
    FamilyCase("olmo", HALF_SPLIT, "norms without weights, clipped projections", {"clip_qkv": 0.7}),
    FamilyCase("olmo2", HALF_SPLIT, "norms after the blocks, QK-norm over all heads"),
    FamilyCase(
        "olmo3",
        HALF_SPLIT,
        "two rotary tables, QK-norm, sliding layers",
        {**_layers("sfs"), **_two_thetas()},
        MIXED,
    ),
    FamilyCase(
        "granite",
        HALF_SPLIT,
        "own scales of embeddings, attention, residuals and logits",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 5.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.21,
        },
    ),
    FamilyCase("starcoder2", HALF_SPLIT, "layer norms and biases"),
    FamilyCase("arcee", HALF_SPLIT, "squared-ReLU feed-forward; YaRN", _rope(**YARN)),
    FamilyCase("seed_oss", HALF_SPLIT, "biased projections", {"attention_bias": True}),
    FamilyCase("apertus", HALF_SPLIT, "QK-norm, xIELU feed-forward; llama3", _rope(**LLAMA3)),
    FamilyCase("bitnet", HALF_SPLIT, "norms inside the blocks"),
    FamilyCase(
        "exaone4",
        HALF_SPLIT,
        "full layers without rotation, QK-norm, sliding layers",
        _layers("sfs"),
        MIXED,
    ),
    FamilyCase(
        "smollm3",
        HALF_SPLIT,
        "some layers without rotation",
        {"no_rope_layers": [1, 0, 1]},
    ),
    FamilyCase("nemotron", PARTIAL, "layer norms around 1", _rope(partial_rotary_factor=0.4)),
    FamilyCase("persimmon", PARTIAL, "QK-norm", _rope(partial_rotary_factor=0.4)),
    FamilyCase(
        "stablelm",
        PARTIAL,
        "QK-norm for each head, parallel residual",
        {
            **_rope(partial_rotary_factor=0.4),
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "use_qkv_bias": True,
        },
    ),
    FamilyCase(
        "phi",
        PARTIAL,
        "parallel blocks, QK-norm",
        {**_rope(partial_rotary_factor=0.4), "qk_layernorm": True},
    ),
    FamilyCase(
        "gpt_neox",
        PARTIAL,
        "fused projections, parallel residual",
        _rope(partial_rotary_factor=0.4),
    ),
    FamilyCase(
        "hunyuan_v1_dense",
        HALF_SPLIT,
        "norms after rotation: only weights equal in pairs, which trained ones are not; dynamic "
        "scaling by a fixed alpha",
        # Longer than any text here: beyond it, the code of transformers 5.13 forgets alpha.
        {**_rope(rope_type="dynamic", alpha=3.0, factor=1.0), "max_position_embeddings": 512},
        equal_in_pairs=("query_layernorm.weight", "key_layernorm.weight"),
    ),
    FamilyCase(
        "vaultgemma",
        HALF_SPLIT,
        "sliding layers, soft-capped attention and logits",
        {
            **_layers("sfs"),
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 7.0,
            "query_pre_attn_scalar": 17,
        },
        MIXED,
    ),
    FamilyCase("jais2", HALF_SPLIT, "layer norms and biases, squared-ReLU feed-forward"),
    FamilyCase("cohere", INTERLEAVED, "parallel blocks, QK-norm", {"use_qk_norm": True}),
    FamilyCase(
        "cohere2",
        INTERLEAVED,
        "full layers without rotation, sliding layers",
        _layers("sfs"),
        MIXED,
    ),
    FamilyCase("helium", INTERLEAVED),
    FamilyCase("ernie4_5", INTERLEAVED, "biased projections", {"use_bias": True}),
    FamilyCase("glm", f"partial {INTERLEAVED}", "", _rope(partial_rotary_factor=0.4)),
    FamilyCase(
        "glm4",
        f"partial {INTERLEAVED}",
        "norms on both sides of the blocks",
        _rope(partial_rotary_factor=0.4),
    ),
    FamilyCase("mixtral", HALF_SPLIT, "experts", EXPERTS),
    FamilyCase(
        "qwen2_moe",
        HALF_SPLIT,
        "experts, one shared by all; some layers without",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 28,
            "shared_expert_intermediate_size": 36,
            "mlp_only_layers": [1],
        },
    ),
    FamilyCase(
        "qwen3_moe",
        HALF_SPLIT,
        "experts, QK-norm",
        {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 28},
    ),
    FamilyCase(
        "olmoe",
        HALF_SPLIT,
        "experts, QK-norm, clipped projections",
        {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 1.5},
        drop=("head_dim",),
    ),
    FamilyCase(
        "phimoe",
        HALF_SPLIT,
        "experts chosen by sparse mixing, biases; longrope with a factor for each regime",
        {
            **EXPERTS,
            "attention_bias": True,
            "lm_head_bias": True,
            **_rope(**TWO_MSCALES),
            "max_position_embeddings": 2048,
        },
    ),
    FamilyCase(
        "granitemoe",
        HALF_SPLIT,
        "experts, own scales of embeddings, attention, residuals and logits",
        {
            **EXPERTS,
            "embedding_multiplier": 3.0,
            "logits_scaling": 5.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.21,
        },
        drop=("head_dim",),
    ),
    FamilyCase(
        "gpt_oss",
        HALF_SPLIT,
        "learned sink logits, experts, sliding layers; YaRN",
        {**_layers("sfs"), **EXPERTS, "swiglu_limit": 1.5, **_rope(**YARN)},
        MIXED,
    ),
    FamilyCase(
        "hunyuan_v1_moe",
        HALF_SPLIT,
        "experts, one shared by all; norms after rotation: only weights equal in pairs, which "
        "trained ones are not",
        {"num_experts": 5, "moe_topk": 2},
        equal_in_pairs=("query_layernorm.weight", "key_layernorm.weight"),
    ),
    FamilyCase(
        "glm4_moe",
        PARTIAL,
        "experts, one shared by all; first layer without; QK-norm",
        {**GROUPED_EXPERTS, **_rope(partial_rotary_factor=0.4), "use_qk_norm": True},
    ),
    FamilyCase(
        "dots1",
        HALF_SPLIT,
        "experts, one shared by all; first layer without; QK-norm, sliding layers",
        {**GROUPED_EXPERTS, **_layers("sfs")},
        MIXED,
    ),
    FamilyCase(
        "ernie4_5_moe",
        INTERLEAVED,
        "experts chosen by corrected scores, some shared; first layer without",
        {
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_intermediate_size": 28,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "use_bias": True,
        },
    ),
    FamilyCase(
        "minimax_m2",
        PARTIAL,
        "experts chosen by corrected scores, QK-norm over all heads",
        {**EXPERTS, **_rope(partial_rotary_factor=0.4)},
    ),
    FamilyCase(
        "flex_olmo",
        HALF_SPLIT,
        "experts, norms after the blocks, QK-norm over all heads",
        {"num_experts": 5, "num_experts_per_tok": 2},
        drop=("head_dim",),
    ),
]
