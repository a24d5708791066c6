"""A tiny model of every multimodal type whose text model can be exported."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from benchmarks.support.families import SIZES
from lminf_export.models.transformers_tables import wrapper_class_name

# Sizes beside those of `families.SIZES`; a text model gets those that its type knows.
MORE_SIZES = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 11,
}
# Sizes of all other parts, by the names that their configurations use.
PARTS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "d_model"), 16),
    **dict.fromkeys(("ffn_dim", "encoder_ffn_dim"), 16),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers"), 1),
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 60,
    "vocab_size": 8,
}
_FULL, _SLIDES = "full_attention", "sliding_attention"
_THETA = {"rope_type": "default", "rope_theta": 1000.0}
_IN_BLOCKS = {"rope_parameters": {**_THETA, "mrope_section": [2, 2, 1]}}
_INTERLEAVED = {
    "text_config": {
        "rope_parameters": {**_THETA, "mrope_section": [2, 2, 1], "mrope_interleaved": True}
    },
    "vision_config": {"deepstack_visual_indexes": [0]},
}
_PARTIAL = {
    "hidden_size": 72,
    "head_dim": 12,
    "rope_parameters": {**_THETA, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5},
}
_HALF = {"hidden_size": 72, "rope_parameters": {**_THETA, "partial_rotary_factor": 0.5}}


@dataclass(frozen=True)
class WrapperCase:
    """A multimodal type's tiny model.

    Attributes:
        model_type: transformers' name of the whole.
        text_type: that of the causal language model which its text model is.
        changes: settings beside those of `SIZES`, by the name of a part, such as "text_config".
        scale: name of a factor of the logits that the text model alone applies.
    """

    model_type: str
    text_type: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scale: str = ""

    def config(self) -> Any:
        """Make the configuration."""
        kind = CONFIG_MAPPING[self.model_type]
        text = kind().get_text_config(decoder=True).to_dict()
        settings = kind().to_dict()
        for name, value in settings.items():
            if name.endswith("_config") and isinstance(value, dict):
                _shrink(value, PARTS)
            elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
                settings[name] = min(value, SIZES["vocab_size"] - 1)
        _shrink(text, {**SIZES, **MORE_SIZES})
        text |= {"rope_parameters": copy.deepcopy(SIZES["rope_parameters"])}
        if "layer_types" in text:
            text["layer_types"] = None
        settings["text_config"] = text
        for name, change in self.changes.items():
            settings[name] = {**settings.get(name, {}), **copy.deepcopy(dict(change))}
        settings.pop("model_type")
        return kind(**settings)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Make the whole model, random in every parameter."""
        torch.manual_seed(seed)
        name = wrapper_class_name(self.model_type)
        assert name is not None
        model: PreTrainedModel = getattr(transformers, name)(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() > 1 and float(parameter.std()) == 0:
                    # Norms and biases start as constants, which would hide a forgotten one.
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the model as the hub has it; return its folder."""
        self.build(seed).save_pretrained(folder)
        return folder


def _shrink(settings: dict[str, Any], sizes: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name.endswith("_config") and isinstance(value, dict):
            _shrink(value, PARTS)
        elif name in sizes and not isinstance(value, (bool, list)):
            settings[name] = copy.deepcopy(sizes[name])


CASES = (
    WrapperCase("aria", "aria_text"),
    WrapperCase("audioflamingo3", "qwen2"),
    WrapperCase("aya_vision", "cohere2", scale="logit_scale"),
    WrapperCase("cohere2_vision", "cohere2", scale="logit_scale"),
    WrapperCase("cosmos3_omni", "qwen3", _INTERLEAVED),
    WrapperCase("deepseek_vl", "llama"),
    WrapperCase("deepseek_vl_hybrid", "llama"),
    WrapperCase("exaone4_5", "exaone4"),
    WrapperCase("fuyu", "persimmon", {"text_config": _HALF}),
    WrapperCase("gemma3", "gemma3_text", {"text_config": {"layer_types": [_FULL, _SLIDES, _FULL]}}),
    WrapperCase("glm46v", "glm4", {"text_config": _PARTIAL}),
    WrapperCase("glm4v", "glm4", {"text_config": _PARTIAL}),
    WrapperCase("glm4v_moe", "glm4_moe", {"text_config": _PARTIAL}),
    WrapperCase("glmasr", "llama", {"audio_config": {"num_key_value_heads": 2, "head_dim": 8}}),
    WrapperCase("glmga", "glm4", {"text_config": _PARTIAL}),
    WrapperCase("got_ocr2", "qwen2"),
    WrapperCase("granite_docling", "granite"),
    WrapperCase("granite_speech", "granite"),
    WrapperCase("granite_speech_plus", "granite"),
    WrapperCase("hyperclovax_vision_v2", "hyperclovax"),
    WrapperCase("idefics2", "mistral"),
    WrapperCase("idefics3", "llama"),
    WrapperCase("internvl", "qwen2"),
    WrapperCase("janus", "llama"),
    WrapperCase("lighton_ocr", "qwen3"),
    WrapperCase("llava", "llama"),
    WrapperCase("llava_next", "llama"),
    WrapperCase("llava_next_video", "llama"),
    WrapperCase("llava_onevision", "qwen2"),
    WrapperCase("mistral3", "mistral"),
    WrapperCase("moss_transcribe_diarize", "qwen3"),
    WrapperCase("ovis2", "qwen2"),
    WrapperCase("paddleocr_vl", "llama", {"text_config": _IN_BLOCKS}),
    WrapperCase("pp_chart2table", "qwen2"),
    WrapperCase("qianfan_ocr", "qwen3"),
    WrapperCase("qwen2_5_omni_thinker", "qwen2", {"text_config": _IN_BLOCKS}),
    WrapperCase("qwen2_5_vl", "qwen2", {"text_config": _IN_BLOCKS}),
    WrapperCase("qwen2_audio", "qwen2"),
    WrapperCase("qwen2_vl", "qwen2", {"text_config": _IN_BLOCKS}),
    WrapperCase("qwen3_asr", "qwen3"),
    WrapperCase("qwen3_omni_moe_thinker", "qwen3_moe", _INTERLEAVED),
    WrapperCase("qwen3_vl", "qwen3", _INTERLEAVED),
    WrapperCase("qwen3_vl_moe", "qwen3_moe", _INTERLEAVED),
    WrapperCase("smolvlm", "llama"),
    WrapperCase("video_llama_3", "qwen2"),
    WrapperCase("video_llava", "llama"),
    WrapperCase("vipllava", "llama"),
    WrapperCase("voxtral", "llama"),
)
BY_NAME = {case.model_type: case for case in CASES}
