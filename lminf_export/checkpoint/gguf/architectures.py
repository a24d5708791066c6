"""The architectures of GGUF that are read, and what makes each a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lminf_export.checkpoint.gguf.metadata import Gguf
from lminf_export.checkpoint.gguf.rope import rope_parameters
from lminf_export.checkpoint.gguf.settings import (
    LAYER_EPS,
    LEFT_OUT,
    Architecture,
    Settings,
    expert_width,
    experts,
    head_dimension,
    sliding,
)
from lminf_export.errors import ModelError, shortened


def _plain(model_type: str, **fixed: Any) -> Callable[[Gguf], Settings]:
    """Return settings that are the same for all files."""

    def settings(gguf: Gguf) -> Settings:
        return {"model_type": model_type, **fixed}

    return settings


def _biased(model_type: str) -> Callable[[Gguf], Settings]:
    """Return settings of models whose projections have biases or not."""

    def settings(gguf: Gguf) -> Settings:
        return {"model_type": model_type, "attention_bias": gguf.has("blk.{}.attn_q.bias")}

    return settings


def _llama(gguf: Gguf) -> Settings:
    biases = {"attention_bias": gguf.has("blk.{}.attn_q.bias")}
    if gguf.integer("expert_count"):
        return {"model_type": "mixtral", **experts(gguf, "num_local_experts")}
    return {"model_type": "llama", **biases, "mlp_bias": gguf.has("blk.{}.ffn_up.bias")}


def _qwen2moe(gguf: Gguf) -> Settings:
    shared = next((x for n, x in gguf.tensors.items() if n.endswith("ffn_down_shexp.weight")), None)
    has_experts = [f"blk.{i}.ffn_gate_inp.weight" in gguf.tensors for i in range(gguf.num_layers)]
    return {
        "model_type": "qwen2_moe",
        **experts(gguf),
        "moe_intermediate_size": expert_width(gguf),
        **({"shared_expert_intermediate_size": shared.shape[-1]} if shared else {}),
        "norm_topk_prob": False,
        "mlp_only_layers": [i for i, has in enumerate(has_experts) if not has],
    }


def _qwen3moe(gguf: Gguf) -> Settings:
    return {
        "model_type": "qwen3_moe",
        **experts(gguf),
        "moe_intermediate_size": expert_width(gguf),
        "norm_topk_prob": gguf.flag("expert_weights_norm") is not False,
    }


def _minimax_m2(gguf: Gguf) -> Settings:
    found = experts(gguf, "num_local_experts")
    return {"model_type": "minimax_m2", **found, "intermediate_size": expert_width(gguf)}


def _gemma2(gguf: Gguf) -> Settings:
    return {
        "model_type": "gemma2",
        **sliding(gguf),
        "attn_logit_softcapping": gguf.number("attn_logit_softcapping"),
        "final_logit_softcapping": gguf.number("final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scalar(gguf, 46),
    }


def _gemma3(gguf: Gguf) -> Settings:
    head_dim = gguf.integer("attention.key_length") or 256
    local = gguf.number("rope.freq_base_swa") or 10000.0
    sliding_layers = sliding(gguf)
    if sliding_layers["sliding_window"] is None:
        sliding_layers["layer_types"] = ["full_attention"] * gguf.num_layers
    return {
        "model_type": "gemma3_text",
        **sliding_layers,
        "final_logit_softcapping": gguf.number("final_logit_softcapping"),
        "query_pre_attn_scalar": _gemma_scalar(gguf, 62),
        "rope_parameters": {
            "full_attention": rope_parameters(gguf, head_dim, gguf.number("rope.freq_base") or 1e6),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _gemma_scalar(gguf: Gguf, layers_of_27b: int) -> float:
    """Return what scores are divided by the root of; of the 27B models it is not a head's width."""
    scale = gguf.number("attention.scale")
    if scale:
        found = round(scale**-2, 3)
        return int(found) if found == int(found) else found
    heads = gguf.required("attention.head_count", 1, 2**14)
    hidden = gguf.required("embedding_length", 1, 2**22)
    if gguf.num_layers == layers_of_27b:
        return hidden // heads
    return gguf.integer("attention.key_length") or hidden // heads


def _phi3(gguf: Gguf) -> Settings:
    found: Settings = {"model_type": "phi3", "sliding_window": sliding(gguf)["sliding_window"]}
    original = gguf.integer("rope.scaling.original_context_length")
    return found | ({"original_max_position_embeddings": original} if original else {})


def _gpt_oss(gguf: Gguf) -> Settings:
    head_dim = gguf.required("attention.key_length", 1, 2**14)
    rope = rope_parameters(gguf, head_dim)
    return {
        "model_type": "gpt_oss",
        **experts(gguf, "num_local_experts"),
        "intermediate_size": expert_width(gguf),
        **sliding(gguf),
        "attention_bias": gguf.has("blk.{}.attn_q.bias"),
        # Its bands are not rounded to whole dimensions, which the file does not say.
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
    }


def _starcoder2(gguf: Gguf) -> Settings:
    return {
        "model_type": "starcoder2",
        "use_bias": gguf.has("blk.{}.attn_q.bias"),
        "sliding_window": sliding(gguf)["sliding_window"],
    }


def _granite(model_type: str) -> Callable[[Gguf], Settings]:
    def settings(gguf: Gguf) -> Settings:
        scales = {
            "attention_multiplier": gguf.number("attention.scale"),
            "embedding_multiplier": gguf.number("embedding_scale"),
            "residual_multiplier": gguf.number("residual_scale"),
            "logits_scaling": gguf.number("logit_scale"),
        }
        return {
            "model_type": model_type,
            "attention_bias": gguf.has("blk.{}.attn_q.bias"),
            **{name: value for name, value in scales.items() if value is not None},
            **(experts(gguf, "num_local_experts") if model_type == "granitemoe" else {}),
        }

    return settings


def _olmo2(gguf: Gguf) -> Settings:
    sliding_layers = sliding(gguf)
    if sliding_layers["sliding_window"] is None:
        return {"model_type": "olmo2"}
    heads = gguf.required("attention.head_count", 1, 2**14)
    head_dim = head_dimension(gguf, gguf.required("embedding_length", 1, 2**22), heads)
    rope = rope_parameters(gguf, head_dim)
    theta = gguf.number("rope.freq_base_swa") or rope["rope_theta"]
    local = {"rope_type": "default", "rope_theta": theta}
    return {
        "model_type": "olmo3",
        **sliding_layers,
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
    }


def _olmoe(gguf: Gguf) -> Settings:
    return {
        "model_type": "olmoe",
        **experts(gguf),
        "intermediate_size": expert_width(gguf),
        "norm_topk_prob": False,
        "clip_qkv": gguf.number("attention.clamp_kqv"),
    }


def _stablelm(gguf: Gguf) -> Settings:
    return {
        "model_type": "stablelm",
        "use_qkv_bias": gguf.has("blk.{}.attn_q.bias"),
        "use_parallel_residual": not gguf.has("blk.{}.ffn_norm.weight"),
        "qk_layernorm": gguf.has("blk.{}.attn_q_norm.weight"),
    }


def _gptneox(gguf: Gguf) -> Settings:
    parallel = gguf.flag("use_parallel_residual")
    return {
        "model_type": "gpt_neox",
        "use_parallel_residual": True if parallel is None else parallel,
        "attention_bias": gguf.has("blk.{}.attn_qkv.bias"),
    }


def _phi2(gguf: Gguf) -> Settings:
    return {"model_type": "phi", "qk_layernorm": gguf.has("blk.{}.attn_q_norm.weight")}


def _falcon(gguf: Gguf) -> Settings:
    heads = gguf.required("attention.head_count", 1, 2**14)
    hidden = gguf.required("embedding_length", 1, 2**22)
    # Some files give the heads of queries here, so it is counted.
    groups = (gguf.shape("blk.0.attn_qkv.weight")[0] * heads // hidden - heads) // 2
    if groups < 1 or heads % groups:
        raise ModelError(
            f"tensor blk.0.attn_qkv.weight of GGUF file {shortened(gguf.name)} has shape "
            f"{list(gguf.shape('blk.0.attn_qkv.weight'))}, which does not fit {heads} heads"
        )
    two_norms = gguf.has("blk.{}.attn_norm_2.weight")
    is_new = two_norms or groups > 1
    return {
        "model_type": "falcon",
        "new_decoder_architecture": is_new,
        **({"num_ln_in_parallel_attn": 2 if two_norms else 1} if is_new else {}),
        "multi_query": True,
        "num_kv_heads": groups,
        "parallel_attn": True,
        "bias": gguf.has("blk.{}.attn_qkv.bias"),
        "alibi": False,
        "num_key_value_heads": LEFT_OUT,
        "intermediate_size": LEFT_OUT,
        "ffn_hidden_size": gguf.required("feed_forward_length", 1, 2**22),
    }


def _bloom(gguf: Gguf) -> Settings:
    return {
        "model_type": "bloom",
        "n_layer": gguf.num_layers,
        "n_head": gguf.required("attention.head_count", 1, 2**14),
        "seq_length": gguf.integer("context_length") or 2048,
        **dict.fromkeys(_NOT_OF_ALIBI, LEFT_OUT),
    }


_NOT_OF_ALIBI = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "rope_parameters", "max_position_embeddings"),
)


def _mpt(gguf: Gguf) -> Settings:
    hidden = gguf.required("embedding_length", 1, 2**22)
    bias = gguf.number("attention.max_alibi_bias") or 0.0
    if not bias:
        raise ModelError(
            f"GGUF file {shortened(gguf.name)} is an MPT model without ALiBi, which has learned "
            f"positions; it cannot be exported"
        )
    return {
        "model_type": "mpt",
        "d_model": hidden,
        "n_layers": gguf.num_layers,
        "n_heads": gguf.required("attention.head_count", 1, 2**14),
        "expansion_ratio": gguf.required("feed_forward_length", 1, 2**22) // hidden,
        "max_seq_len": gguf.required("context_length", 1, 2**40),
        "attn_config": {
            "model_type": "",
            "alibi": True,
            "alibi_bias_max": int(bias),
            "clip_qkv": gguf.number("attention.clamp_kqv"),
        },
        "hidden_size": LEFT_OUT,
        **dict.fromkeys(_NOT_OF_ALIBI, LEFT_OUT),
    }


def _cohere(model_type: str) -> Callable[[Gguf], Settings]:
    def settings(gguf: Gguf) -> Settings:
        found: Settings = {
            "model_type": model_type,
            "logit_scale": gguf.number("logit_scale"),
            "attention_bias": gguf.has("blk.{}.attn_q.bias"),
        }
        if model_type == "cohere2":
            return found | sliding(gguf)
        return found | {"use_qk_norm": gguf.has("blk.{}.attn_q_norm.weight")}

    return settings


def _exaone4(gguf: Gguf) -> Settings:
    found = {"model_type": "exaone4", **sliding(gguf)}
    if found["sliding_window"] is None:
        return found | {"layer_types": ["full_attention"] * gguf.num_layers}
    return found


_LLAMA = Architecture(_llama, rotary=True)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "arcee": Architecture(_biased("arcee"), rotary=True),
    "bloom": Architecture(
        _bloom, "layer_norm_epsilon", LAYER_EPS, fused="heads", has_head_dim=False
    ),
    "cohere2": Architecture(_cohere("cohere2"), "layer_norm_eps", LAYER_EPS),
    "command-r": Architecture(
        _cohere("cohere"), "layer_norm_eps", LAYER_EPS, has_head_dim=False
    ),
    "exaone4": Architecture(_exaone4),
    "falcon": Architecture(
        _falcon, "layer_norm_epsilon", LAYER_EPS, fused="groups", has_head_dim=False
    ),
    "gemma": Architecture(_plain("gemma"), shifted_norms=True),
    "gemma2": Architecture(_gemma2, shifted_norms=True),
    "gemma3": Architecture(_gemma3, shifted_norms=True),
    "gpt-oss": Architecture(_gpt_oss),
    "gptneox": Architecture(
        _gptneox, "layer_norm_eps", LAYER_EPS, fused="heads", has_head_dim=False
    ),
    "granite": Architecture(_granite("granite"), rotary=True, has_head_dim=False),
    "granitemoe": Architecture(_granite("granitemoe"), rotary=True, has_head_dim=False),
    "minimax-m2": Architecture(_minimax_m2),
    "mpt": Architecture(_mpt, "layer_norm_epsilon", LAYER_EPS, has_head_dim=False),
    "nemotron": Architecture(_plain("nemotron"), "norm_eps", LAYER_EPS, shifted_norms=True),
    "olmo": Architecture(
        lambda gguf: {"model_type": "olmo", "clip_qkv": gguf.number("attention.clamp_kqv")},
        rotary=True, has_head_dim=False),
    "olmo2": Architecture(_olmo2, has_head_dim=False),
    "olmoe": Architecture(_olmoe, has_head_dim=False),
    "phi2": Architecture(_phi2, "layer_norm_eps", LAYER_EPS, has_head_dim=False),
    "phi3": Architecture(_phi3, has_head_dim=False),
    "qwen2": Architecture(_plain("qwen2"), has_head_dim=False),
    "qwen2moe": Architecture(_qwen2moe, has_head_dim=False),
    "qwen3": Architecture(_biased("qwen3")),
    "qwen3moe": Architecture(_qwen3moe),
    "seed_oss": Architecture(_biased("seed_oss")),
    "smollm3": Architecture(_biased("smollm3"), rotary=True),
    "stablelm": Architecture(_stablelm, "layer_norm_eps", LAYER_EPS, has_head_dim=False),
    "starcoder2": Architecture(_starcoder2, "norm_epsilon", LAYER_EPS, has_head_dim=False),
}  # fmt: skip
