"""A tiny model of every multimodal type whose text model can be exported."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, PreTrainedModel

from benchmarks.support.families import SIZES, make_random
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.checkpoint.text_part import without_outside_towers
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
_SMALL_CODES = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "codebook_size": 32,
    "num_embeddings": 32,
    "image_token_embed_dim": 16,
}
_EMU3 = {"vq_config": _SMALL_CODES, "vocabulary_map": {"<image>": 130}}
_CROSSED = {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1]}}
# Of a type whose one configuration is that of its text model too.
_FLAT = {
    "": {"rope_parameters": {**_THETA, "partial_rotary_factor": 0.6}},
    "vision_config": {"num_hidden_layers": 2, "crop_size": 28},
    "audio_config": {"num_blocks": 1, "ext_pw_out_channel": 16, "nemo_conv_channels": 16},
}
_TWO_KINDS = {"rope_parameters": {"full_attention": _THETA, "sliding_attention": _THETA}}
_DEEPSTACK = {
    "text_config": {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "vision_config": {"hidden_size": 64, "image_size": 56},
    "deepstack_layer_map": [[0, 0]],
    "spatial_target_layers": [0],
    "downsample_rate": "1/2",
}
_NORMS = ("query_layernorm.weight", "key_layernorm.weight")
_FOUR_IDS = {
    "text_config": {"head_dim": 10, "rope_parameters": {**_THETA, "mrope_section": [2, 1, 1, 1]}},
    "vision_config": {"num_key_value_heads": 2},
}
_HALF = {"hidden_size": 72, "rope_parameters": {**_THETA, "partial_rotary_factor": 0.5}}


@dataclass(frozen=True)
class WrapperCase:
    """A multimodal type's tiny model.

    Attributes:
        model_type: transformers' name of the whole.
        text_type: that of the causal language model which its text model is.
        changes: settings beside those of `SIZES`, by the name of a part, such as "text_config";
            under "" those of the whole.
        equal_in_pairs: ends of names of weights that are equal within each rotated pair.
        scale: name of a factor of the logits that the text model alone applies.
        reads_by: the part that reads and writes text, of a model that speaks too; the others are
            not built.
    """

    model_type: str
    text_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    scale: str = ""
    equal_in_pairs: tuple[str, ...] = ()
    reads_by: str = ""

    def config(self) -> Any:
        """Make the configuration, of the part that reads."""
        kind = CONFIG_MAPPING["_".join(x for x in (self.model_type, self.reads_by) if x)]
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
        if kind().get_text_config(decoder=True).model_type == self.model_type:
            settings = {**text, **{k: v for k, v in settings.items() if k.endswith("_config")}}
        else:
            settings["text_config"] = text
        for name, change in self.changes.items():
            if not name:
                settings |= change
            elif isinstance(settings.get(name), dict):
                settings[name] = {**settings[name], **copy.deepcopy(change)}
            else:
                settings[name] = copy.deepcopy(change)
        settings.pop("model_type")
        return kind(**settings)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Make the whole model, or the part that reads, random in every parameter."""
        torch.manual_seed(seed)
        config = self.config()
        name = wrapper_class_name(config.model_type)
        assert name is not None
        with without_outside_towers():
            model: PreTrainedModel = getattr(transformers, name)(config)
        make_random(model, self.equal_in_pairs)
        return model.eval()

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the model as the hub has it; return its folder."""
        self.write(self.build(seed), folder)
        return folder

    def write(self, model: PreTrainedModel, folder: Path, *, is_old: bool = True) -> None:
        """Write a model of the case, in the names of the hub or in those of transformers 5."""
        model.save_pretrained(folder, save_original_format=is_old)
        if not self.reads_by:
            return
        path = folder / "model.safetensors"
        tensors = {f"{self.reads_by}.{name}": x for name, x in load_file(path).items()}
        save_file(tensors, path)
        content = json.loads((folder / "config.json").read_text())
        whole = {"model_type": self.model_type, f"{self.reads_by}_config": content}
        (folder / "config.json").write_text(json.dumps(whole))


def _shrink(settings: dict[str, Any], sizes: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name.endswith("_config") and isinstance(value, dict):
            _shrink(value, PARTS)
        elif name in sizes and not isinstance(value, (bool, list)):
            settings[name] = copy.deepcopy(sizes[name])


@torch.no_grad()
def whole_logits(case: WrapperCase, whole: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (T, V) of a whole model for text (1, T), scaled as its text model's are."""
    factor = getattr(whole.config.get_text_config(decoder=True), case.scale) if case.scale else 1
    logits: torch.Tensor = whole(input_ids=tokens).logits[0].float() * factor
    return logits


@torch.no_grad()
def text_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (T, V) for text (1, T) of a folder's text model, as an export reads it."""
    model = load_model(open_checkpoint(open_source(folder)), torch.float32, None)
    logits: torch.Tensor = model(input_ids=tokens).logits[0].float()
    return logits


CASES = (
    WrapperCase("aria", "aria_text"),
    WrapperCase("audioflamingo3", "qwen2"),
    WrapperCase("aya_vision", "cohere2", scale="logit_scale"),
    WrapperCase("cohere2_vision", "cohere2", scale="logit_scale"),
    WrapperCase("cohere_compass", "cohere_compass_text", {"text_config": _TWO_KINDS}),
    WrapperCase("cosmos3_omni", "qwen3", _INTERLEAVED),
    WrapperCase("deepseek_vl", "llama"),
    WrapperCase("deepseek_vl_hybrid", "llama"),
    WrapperCase("emu3", "llama", _EMU3),
    WrapperCase("exaone4_5", "exaone4"),
    WrapperCase("fast_vlm", "qwen2"),
    WrapperCase(
        "fun_asr_nano",
        "qwen3",
        {"adaptor_config": {"hidden_size": 60, "intermediate_size": 15}},
    ),
    WrapperCase("fuyu", "persimmon", {"text_config": _HALF}),
    WrapperCase("gemma3", "gemma3_text", {"text_config": {"layer_types": [_FULL, _SLIDES, _FULL]}}),
    WrapperCase("glm46v", "glm4", {"text_config": _PARTIAL}),
    WrapperCase("glm4v", "glm4", {"text_config": _PARTIAL}),
    WrapperCase("glm4v_moe", "glm4_moe", {"text_config": _PARTIAL}),
    WrapperCase("glm_ocr", "glm4", {"text_config": _PARTIAL}),
    WrapperCase("glmasr", "llama", {"audio_config": {"num_key_value_heads": 2, "head_dim": 8}}),
    WrapperCase("glmga", "glm4", {"text_config": _PARTIAL}),
    WrapperCase("got_ocr2", "qwen2"),
    WrapperCase("granite4_vision", "granite", _DEEPSTACK),
    WrapperCase("granite_docling", "granite"),
    WrapperCase("granite_speech", "granite"),
    WrapperCase("granite_speech_plus", "granite"),
    WrapperCase("hunyuan_vl", "hunyuan_v1_dense", _FOUR_IDS, equal_in_pairs=_NORMS),
    WrapperCase("hyperclovax_vision_v2", "hyperclovax"),
    WrapperCase("idefics2", "mistral"),
    WrapperCase("idefics3", "llama"),
    WrapperCase("internvl", "qwen2"),
    WrapperCase("janus", "llama", {"vq_config": _SMALL_CODES}),
    WrapperCase("lighton_ocr", "qwen3"),
    WrapperCase("llava", "llama"),
    WrapperCase("llava_next", "llama"),
    WrapperCase("llava_next_video", "llama"),
    WrapperCase("llava_onevision", "qwen2"),
    WrapperCase("mistral3", "mistral"),
    WrapperCase("mllama", "llama", _CROSSED),
    WrapperCase("moss_transcribe_diarize", "qwen3"),
    WrapperCase("musicflamingo", "qwen2"),
    WrapperCase("ovis2", "qwen2", {"vision_config": {"vocab_size": 64}}),
    WrapperCase("paddleocr_vl", "llama", {"text_config": _IN_BLOCKS}),
    WrapperCase("perception_lm", "llama", {"vision_config": {"model_args": {"embed_dim": 16}}}),
    WrapperCase("phi4_multimodal", "phi3", _FLAT),
    WrapperCase("pp_chart2table", "qwen2"),
    WrapperCase("qianfan_ocr", "qwen3"),
    WrapperCase("qwen2_5_omni", "qwen2", {"text_config": _IN_BLOCKS}, reads_by="thinker"),
    WrapperCase("qwen2_5_omni_thinker", "qwen2", {"text_config": _IN_BLOCKS}),
    WrapperCase("qwen2_5_vl", "qwen2", {"text_config": _IN_BLOCKS}),
    WrapperCase("qwen2_audio", "qwen2"),
    WrapperCase("qwen2_vl", "qwen2", {"text_config": _IN_BLOCKS}),
    WrapperCase("qwen3_asr", "qwen3"),
    WrapperCase("qwen3_omni_moe", "qwen3_moe", _INTERLEAVED, reads_by="thinker"),
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
