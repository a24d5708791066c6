"""Models that wrap a text model: which text model it is, as a causal language model of its own.

A multimodal model reads images or sound by towers of their own and writes text by a decoder, which
is a text model like any other, and is what can be exported. transformers names it by
`get_text_config`. Some of these decoders are model types that exist inside of wrappers only; those
in `PLAIN_TYPES` compute what a causal language model of another type computes, as the tests of
each wrapper show.

Rotation by several ids a token (`mrope`: three in the Qwen-VL and GLM-V types, four in HunYuan-VL):
frequency i turns by id_{s(i)} · f_i, where s(i) is the section that i is assigned to, in blocks or
interleaved. The ids of a token of text are equal, its position p, so the angle is p · f_i whatever
s is: plain rotation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lminf_export.errors import ModelError, shortened
from lminf_export.models.kinds import SEE_FAMILIES, unlike_rings
from lminf_export.models.transformers_tables import CODE_ERRORS, is_causal_lm, wrapper_class_name

# Each is proved by a case of the same name in benchmarks/support/wrappers.py.
TESTED_WRAPPERS = (
    "aria",
    "audioflamingo3",
    "aya_vision",
    "cohere2_vision",
    "cohere_compass",
    "cosmos3_omni",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "emu3",
    "exaone4_5",
    "fast_vlm",
    "fun_asr_nano",
    "fuyu",
    "gemma3",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmasr",
    "glmga",
    "got_ocr2",
    "granite4_vision",
    "granite_docling",
    "granite_speech",
    "granite_speech_plus",
    "hunyuan_vl",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "mllama",
    "moss_transcribe_diarize",
    "musicflamingo",
    "ovis2",
    "paddleocr_vl",
    "perception_lm",
    "phi4_multimodal",
    "pp_chart2table",
    "qianfan_ocr",
    "qwen2_5_omni",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_asr",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llama_3",
    "video_llava",
    "vipllava",
    "voxtral",
)
# Model type of a text model inside of wrappers only → the model type that computes the same.
PLAIN_TYPES: Mapping[str, str] = {
    "emu3_text_model": "llama",
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "glm_ocr_text": "glm4",
    "granite4_vision_text": "granite",
    "granite_docling_text": "granite",
    "hunyuan_vl": "hunyuan_v1_dense",  # as transformers 5.13 names it
    "hunyuan_vl_text": "hunyuan_v1_dense",
    "mllama_text_model": "llama",
    "paddleocr_vl_text": "llama",
    "phi4_multimodal": "phi3",
    "qwen2_5_omni_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_omni_moe_text": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
# Modules beside those of the plain type, which text does not pass, by their paths' beginnings; and
# types whose table of embeddings has more rows than the vocabulary, for tokens of no text.
BESIDE_TEXT: Mapping[str, str] = {"phi4_multimodal": "embed_tokens_extend."}
MORE_ROWS = ("mllama_text_model",)
# What the code of such a type does whatever its configuration says.
_ALWAYS: Mapping[str, Mapping[str, Any]] = {
    "glm_ocr_text": {"attention_bias": False},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
}
# Wrappers whose text model by itself is another model than the one that was trained.
_NOT_BY_ITSELF: Mapping[str, str] = {
    "paligemma": (
        "prefix LM: the whole prompt, image and text, is attended in both directions, by training "
        "and by its processor, and a stream does not have the later tokens of a prompt yet"
    ),
    "shieldgemma2": "it classifies images by policies and writes no text",
    "evolla": "cross-attention: among its text layers are others that attend to the protein",
    "git": "learned absolute positions, and beyond the last of them is none to give a token",
    "idefics": "cross-attention: among its text layers are others that attend to the image",
    "kyutai_speech_to_text": "every token of text comes with the sound of the same moment",
}
_NOT_SETTINGS = {"model_type", "architectures", "transformers_version"}
# What of a rotation says how several ids are shared among frequencies.
_SECTIONS = ("mrope_section", "mrope_interleaved", "xdrope_section")


def reading_part(config: Any) -> Any:
    """Return the configuration of the part that reads and writes text, of models that speak too."""
    return getattr(config, "thinker_config", None) or config


def text_config_of(config: Any) -> Any | None:
    """Return the configuration of the causal language model that a model wraps.

    Args:
        config: of the whole model, as transformers reads it.

    Returns:
        A copy, of a type that transformers has a causal language model of; None for a model that
        is not one that wraps another and writes text.

    Raises:
        ModelError: it wraps a text model that cannot be one by itself, with the reason.
    """
    text = _wrapped(config)
    if text is None:
        return None
    if config.model_type in _NOT_BY_ITSELF:
        raise refusal(config.model_type, _NOT_BY_ITSELF[config.model_type])
    if getattr(text, "is_encoder_decoder", False):
        raise refusal(
            config.model_type,
            "it is an encoder–decoder, whose decoder attends to an encoder's output beside its "
            "own keys",
        )
    kind, inner = config.model_type, text.model_type
    if inner in PLAIN_TYPES:
        return _as_plain(text, PLAIN_TYPES[inner])
    if is_causal_lm(inner) is not True:
        reason = unlike_rings(text)
        raise refusal(
            kind,
            reason
            or f"its text model {shortened(repr(inner), 40)} exists as a part of it only: "
            f"transformers has no causal language model of that type",
        )
    return copy.deepcopy(text)


def layers_of_text(config: Any) -> tuple[int, ...] | None:
    """Return the layers that a text passes where there are others for images alone; else None.

    Args:
        config: of the whole model.
    """
    text = config.get_text_config(decoder=True)
    others = getattr(text, "cross_attention_layers", None)
    if text.model_type != "mllama_text_model" or not isinstance(others, (list, tuple)):
        return None
    return tuple(layer for layer in range(text.num_hidden_layers) if layer not in others)


def text_only_notice(model_type: str) -> str:
    """Return what the user should know of a bundle that holds a wrapper's text model."""
    untested = (
        ""
        if model_type in TESTED_WRAPPERS
        else "; no test has compared it with the whole model on text"
    )
    return (
        f"text only: this is the text model of a {shortened(model_type, 40)} model; what reads "
        f"images, video or sound is not exported{untested}"
    )


def _wrapped(config: Any) -> Any | None:
    """Return the configuration of the text model in a wrapper that writes text, else None."""
    try:
        text = config.get_text_config(decoder=True)
    except CODE_ERRORS:
        return None  # it has several
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) or wrapper_class_name(kind) is None:
        return None
    if text is config:  # one configuration for all parts, or a text model
        return text if kind in PLAIN_TYPES or kind in _NOT_BY_ITSELF else None
    return text if isinstance(getattr(text, "model_type", None), str) else None


def _as_plain(text: Any, model_type: str) -> Any:
    """Return a configuration of another type with every setting that the type has."""
    from transformers import CONFIG_MAPPING

    plain = CONFIG_MAPPING[model_type]
    known = {*plain().to_dict(), *plain.attribute_map} - _NOT_SETTINGS
    known -= _ALWAYS.get(text.model_type, {}).keys()
    settings = {name: value for name, value in text.to_dict().items() if name in known}
    if "head_dim" in known and settings.get("head_dim") is None:
        # Where a type has none of its own, heads share the width.
        own = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        settings["head_dim"] = own
    kept = layers_of_text(text)
    if kept is not None:
        settings["num_hidden_layers"] = len(kept)
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict):
        settings["rope_parameters"] = {k: v for k, v in rope.items() if k not in _SECTIONS}
    return plain(**settings, **_ALWAYS.get(text.model_type, {}))


def refusal(model_type: str, reason: str) -> ModelError:
    """Return the error for a wrapper whose text model cannot be exported."""
    return ModelError(
        f"the text model of a {shortened(model_type, 40)} model cannot be exported: {reason}; "
        f"{SEE_FAMILIES}"
    )
