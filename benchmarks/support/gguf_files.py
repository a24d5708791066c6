"""Writes small models as GGUF files, as llama.cpp's conversion lays them out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

# transformers' model type → GGUF's architecture, where they are not called alike.
ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "gpt_neox": "gptneox",
    "phi": "phi2",
    "olmo3": "olmo2",
    "cohere": "command-r",
    "minimax_m2": "minimax-m2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
_ROTARY = ("llama", "arcee", "granite", "granitemoe", "olmo", "smollm3")
_SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron")
_LAYER_NORMS = (
    *("bloom", "cohere2", "command-r", "falcon", "gptneox", "mpt", "nemotron", "olmo", "phi2"),
    *("stablelm", "starcoder2"),
)
_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


def save_gguf(
    folder: Path,
    path: Path,
    kind: str = "F32",
    *,
    metadata: dict[str, Any] | None = None,
    shard_tensors: int = 0,
) -> Path:
    """Write a model of transformers as GGUF; matrices in one type, all else in F32.

    Args:
        folder: the model's.
        path: the file to write.
        kind: GGUF's name of the type of matrices.
        metadata: more keys.
        shard_tensors: how many tensors go into one of several files; 0 for one file.

    Returns:
        The file, or the first of several.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    config = model.config
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name, split_max_tensors=shard_tensors)
    for key, value in (_settings(name, config) | (metadata or {})).items():
        _put(writer, key, value)
    for own, tensor in _tensors(name, model):
        _add(writer, own, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not shard_tensors else min(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def _put(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _add(writer: Any, name: str, tensor: torch.Tensor, kind: str) -> None:
    numbers = tensor.detach().to(torch.float32).contiguous().numpy()
    if numbers.ndim < 2 or kind == "F32" or "norm" in name or "inp" in name:
        writer.add_tensor(name, numbers)
        return
    writer.add_tensor(name, quantised(numbers, kind), raw_dtype=Kind[kind])


def quantised(numbers: np.ndarray, kind: str) -> np.ndarray:
    """Return the bytes of a matrix in a type; types that cannot be written get random blocks."""
    if kind == "F16":
        return numbers.astype(np.float16)
    try:
        return gguf.quantize(numbers, Kind[kind])
    except NotImplementedError:
        return random_blocks(numbers.shape, kind)


def random_blocks(shape: tuple[int, ...], kind: str, size: float = 0.05) -> np.ndarray:
    """Return blocks of random bits whose numbers are finite and about of a size."""
    elements, count = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(math.prod(shape))
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, count), dtype=np.uint8)
    # The scales of a block are 16-bit floats; where they are differs from type to type.
    for place in {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
    }.get(kind, (0,)):
        scale = np.float16(size / {"Q6_K": 2000, "Q3_K": 60, "IQ4_XS": 2000}.get(kind, 400))
        raw[..., place : place + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    return raw.reshape(*shape[:-1], -1)


def _settings(name: str, config: Any) -> dict[str, Any]:
    """Return the metadata of an architecture, as a conversion writes it."""
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    hidden = _first(config, "hidden_size", "d_model")
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    groups = _groups(config, heads)
    found: dict[str, Any] = {
        "block_count": _first(config, "num_hidden_layers", "n_layer", "n_layers"),
        "context_length": _first(config, "max_position_embeddings", "max_seq_len", default=64),
        "embedding_length": hidden,
        "feed_forward_length": _first(
            config, "ffn_hidden_size", "intermediate_size", default=4 * hidden
        ),
        "attention.head_count": heads,
        "attention.head_count_kv": groups if name != "mpt" else None,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "expert_count": _first(config, "num_local_experts", "num_experts", default=None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "attention.scale": getattr(config, "attention_multiplier", None),
        "embedding_scale": getattr(config, "embedding_multiplier", None),
        "residual_scale": getattr(config, "residual_multiplier", None),
        "logit_scale": _first(config, "logits_scaling", "logit_scale", default=None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "attention.clamp_kqv": getattr(config, "clip_qkv", None),
        "use_parallel_residual": getattr(config, "use_parallel_residual", None),
    }
    eps = float(_first(config, *_EPS, default=1e-5))
    key = "layer_norm_epsilon" if name in _LAYER_NORMS else "layer_norm_rms_epsilon"
    found[f"attention.{key}"] = eps
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window and name not in ("llama", "qwen2", "starcoder2"):
        found["attention.sliding_window"] = window
        if kinds and name in ("gemma2", "gemma3", "gpt-oss", "cohere2", "olmo2", "exaone4"):
            found["attention.sliding_window_pattern"] = [x == "sliding_attention" for x in kinds]
    if name in ("gemma2", "gemma3"):
        found["attention.scale"] = float(config.query_pre_attn_scalar) ** -0.5
    if name == "mpt":
        found["attention.max_alibi_bias"] = float(config.attn_config.alibi_bias_max)
        found["attention.clamp_kqv"] = config.attn_config.clip_qkv
    found |= _rope(config, head_dim)
    keyed: dict[str, Any] = {
        f"{name}.{key}": value for key, value in found.items() if value is not None
    }
    ids = {"bos": "bos", "eos": "eos", "padding": "pad"}
    for key, own in ids.items():
        keyed[f"tokenizer.ggml.{key}_token_id"] = getattr(config, f"{own}_token_id", None)
    return keyed


def _rope(config: Any, head_dim: int) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        return {}
    turned = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    found = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": turned}
    if local is not None:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = rope["rope_type"]
        found["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "longrope":
        found["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    return found


def _tensors(name: str, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
    known = gguf.get_tensor_name_map(architecture, 64).get_name

    def find(hf: str) -> str | None:
        return known(hf) or known(hf.partition(".")[2])

    state = dict(model.state_dict())
    if getattr(config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    norms: dict[str, list[torch.Tensor]] = {}
    for hf, tensor in state.items():
        if match := re.fullmatch(r".*\.(\d+)\.\w+\.([qk])_layernorm\.norms\.\d+\.weight", hf):
            own = f"blk.{match[1]}.attn_{match[2]}_norm.weight"
            norms.setdefault(own, []).append(tensor)
        elif ".experts." in hf:
            yield from _experts(hf, tensor, name)
        else:
            if match := re.fullmatch(r".*\.(\d+)\.mlp\.(gate\.)?e_score_correction_bias", hf):
                yield f"blk.{match[1]}.exp_probs_b.bias", tensor
                continue
            base, _, suffix = hf.rpartition(".")
            own = find(base) if suffix in ("weight", "bias") else find(hf)
            if own is None and "_layernorm" in hf:  # of phi2, as llama.cpp names them
                number, part = re.match(r".*\.(\d+)\.self_attn\.([qk])_layernorm", hf).groups()  # type: ignore[union-attr]
                own = f"blk.{number}.attn_{part}_norm"
            if match := re.fullmatch(r".*\.(\d+)\.block_sparse_moe\.router", base):
                own = f"blk.{match[1]}.ffn_gate_inp"
            if own is None:
                raise ValueError(f"GGUF has no name for {hf}")
            suffix = suffix if suffix in ("weight", "bias") else "weight"
            yield f"{own}.{suffix}", _laid_out(name, f"{own}.{suffix}", tensor, config)
    for own, parts in norms.items():
        yield own, torch.stack(parts)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, config)
    if rope.get("rope_type") == "longrope":
        for key in ("long", "short"):
            yield f"rope_factors_{key}.weight", torch.tensor(rope[f"{key}_factor"])


def _laid_out(name: str, own: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    groups = _groups(config, heads)
    if name in _ROTARY and (match := re.search(r"attn_([qk])\.", own)):
        count = heads if match[1] == "q" else groups
        shape = (count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
        return tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape)
    if name in ("bloom", "gptneox") and "attn_qkv" in own:
        shape = (heads, 3, tensor.shape[0] // heads // 3, *tensor.shape[1:])
        parts = tensor.reshape(shape)
        return torch.cat([parts[:, i].flatten(0, 1) for i in range(3)])
    if name == "falcon" and "attn_qkv" in own:
        width = tensor.shape[0] // (heads + 2 * groups)
        parts = tensor.reshape(groups, heads // groups + 2, width, *tensor.shape[1:])
        return torch.cat(
            [parts[:, :-2].flatten(0, 2), parts[:, -2].flatten(0, 1), parts[:, -1].flatten(0, 1)]
        )
    if name in _SHIFTED and own.endswith("norm.weight"):
        return tensor + 1
    return tensor.flatten() if "shexp" in own and tensor.shape[0] == 1 else tensor


def _experts(hf: str, tensor: torch.Tensor, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    number, part = re.match(r".*\.(\d+)\.\w+\.experts\.(\w+)", hf).groups()  # type: ignore[union-attr]
    suffix = "bias" if part.endswith("_bias") else "weight"
    is_gpt_oss = name == "gpt-oss"
    if is_gpt_oss and suffix == "weight":
        tensor = tensor.transpose(1, 2)
    if part.startswith("down"):
        yield f"blk.{number}.ffn_down_exps.{suffix}", tensor
        return
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if is_gpt_oss else tensor.chunk(2, 1)
    yield f"blk.{number}.ffn_gate_exps.{suffix}", gate
    yield f"blk.{number}.ffn_up_exps.{suffix}", up


def _llama3_factors(rope: dict[str, Any], config: Any) -> torch.Tensor:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = []
    for i in range(0, dim, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors)


def _groups(config: Any, heads: int) -> int:
    if getattr(config, "multi_query", False) and not config.new_decoder_architecture:
        return 1
    return _first(config, "num_kv_heads", "num_key_value_heads", default=heads)


def _first(config: Any, *names: str, default: Any = ...) -> Any:
    found = (getattr(config, name) for name in names if getattr(config, name, None) is not None)
    value = next(found, default)
    if value is ...:
        raise ValueError(f"a {config.model_type} configuration has none of {names}")
    return value
