"""Kinds of models whose attention a ring of keys cannot compute, recognised by their configuration.

Each is named as what it is, before a model is built. Facts are read from the fields that
transformers' configurations share, so a model type that nobody has tried is recognised too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lminf_export.errors import ModelError, shortened
from lminf_export.models.transformers_tables import is_causal_lm, is_encoder_decoder, is_masked_lm

SEE_FAMILIES = "`lminf families` lists what can"
_STATEFUL = re.compile(
    r"linear|mamba|conv|recurrent|ssm|delta|rwkv|retention|lstm|lightning|kda|hybrid", re.IGNORECASE
)
_LAYER_LISTS = ("layer_types", "layers_block_type", "layer_block_types", "block_types")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
# Fields that only a layer with a state has; without a list of kinds they speak for every layer.
_STATE_FIELDS = re.compile(
    r"mamba_\w+|ssm_\w+|state_size|conv_kernel|conv1d_width|lru_width|rescale_every"
    r"|inference_state_dtype|short_conv_kernel_size|time_mix_\w+"
)
_INDEX_FIELDS = re.compile(r"index(er)?_(topk|topk_blocks|budget|n_heads)|moba_\w+|sparse_config")
_PARTS = re.compile(
    r"(text|vision|audio|image|video|vq|speech|patcher|\w*encoder|\w*decoder)_config"
)

_CAUSAL = re.compile(r"(is_|use_)?causal(_attention|_mask)?")
_TWO_WAY = re.compile(r"(is_|use_)?bidirectional(_attention|_mask)?")
_PREFIX = re.compile(r"(is_|use_)?prefix_lm|prefix_attention")
# Tables in which a configuration keeps the settings of its text model or of its attention.
_NESTED = ("text_config", "attn_config", "llm_config", "language_config")


class Facts:
    """Fields of a configuration: of transformers' class where there is one, else of the file.

    Args:
        content: of config.json.
        config: transformers' object, or None for a type that it does not know.
    """

    def __init__(self, content: Mapping[str, Any], config: Any = None) -> None:
        self.model_type: str = content["model_type"]
        self.fields: dict[str, Any] = {**content, **(vars(config) if config is not None else {})}
        self._own = _fields_of(config)

    def get(self, name: str) -> Any:
        """Return a field, None where there is none."""
        return self.fields.get(name, self._own.get(name))

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, where a usual name gives them."""
        found = (self.get(name) for name in _LAYER_COUNTS)
        return next((x for x in found if isinstance(x, int)), None)

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of each layer, a shorter pattern repeated; empty if none are listed."""
        for name in _LAYER_LISTS:
            kinds = self.get(name)
            if isinstance(kinds, (list, tuple)) and kinds:
                count = max(self.num_layers or 0, len(kinds)) if name == "block_types" else 0
                repeated = -(-count // len(kinds)) or 1
                return [str(kind) for kind in kinds * repeated][: count or len(kinds)]
        pattern = self.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            return ["mamba" if letter == "M" else "attention" for letter in pattern]
        return []

    def nested(self) -> Iterator[Mapping[str, Any]]:
        """Yield the fields, and those of the tables for text and attention."""
        yield self.fields
        for name in _NESTED:
            part = self.get(name)
            if isinstance(part, Mapping):
                yield part
            elif part is not None and hasattr(part, "__dict__"):
                yield vars(part)


def _fields_of(config: Any) -> dict[str, Any]:
    """Return defaults that a class of configurations has as attributes of the class."""
    if config is None:
        return {}
    names = ("is_decoder", "is_encoder_decoder")
    return {name: getattr(type(config), name, None) for name in names}


def check_kind(
    content: Mapping[str, Any], config: Any, *, tested: bool, wrapper: str | None = None
) -> None:
    """Refuse a model whose attention cannot be computed with rings, saying what kind it is.

    Args:
        content: of config.json; it names a model type.
        config: as transformers reads it, or None for a type that it does not know.
        tested: the model type has tests; then only settings that change its masks are checked.
        wrapper: type of the multimodal model whose text model it is.

    Raises:
        ModelError: in one line what the model is.
    """
    facts = Facts(content, config)
    reasons = list(_not_causal(facts))
    if not tested:
        reasons += _kinds(facts)
    if reasons:
        raise refusal(facts.model_type, reasons, wrapper)


def refusal(model_type: str, reasons: list[str], wrapper: str | None = None) -> ModelError:
    """Return the error for a model type: its first reason in full, the names of the others."""
    first, *others = reasons
    also = " and ".join(reason.split(":")[0] for reason in others[:2])
    of = f" (the text model of {shortened(wrapper, 40)})" if wrapper else ""
    return ModelError(
        f"model type {shortened(repr(model_type), 40)}{of} cannot be exported: {first}"
        + (f" (also {also})" if also else "")
        + f"; {SEE_FAMILIES}"
    )


def _not_causal(facts: Facts) -> Iterator[str]:
    """Yield the settings by which a token sees later ones, if only in a prefix."""
    for fields in facts.nested():
        for name, value in fields.items():
            if _CAUSAL.fullmatch(name) and value is False:
                yield _two_way(f"{name}: false")
            elif _TWO_WAY.fullmatch(name) and value and value != "vision":
                yield _two_way(f"{name}: {shortened(str(value), 20).lower()}")
            elif _PREFIX.fullmatch(name) and value is True:
                yield (
                    f"prefix LM: {name}: true in config.json lets the tokens of the prompt see "
                    f"later ones, which a stream does not have yet"
                )
            elif name == "attn_type" and value == "bi":
                yield _two_way("attn_type: bi")
        kinds = fields.get("layer_types")
        if isinstance(kinds, list) and any("bidirectional" in str(kind) for kind in kinds):
            yield _two_way("bidirectional layer_types")
    names = facts.fields.get("architectures")
    named = [x for x in names if "bidirec" in str(x).lower()] if isinstance(names, list) else []
    if named:
        yield _two_way(f"architecture {shortened(str(named[0]), 50)}")


def _two_way(setting: str) -> str:
    return (
        f"two-way attention: {setting} in config.json lets tokens see later ones, as in an "
        f"embedding model; a stream does not have them yet"
    )


def _kinds(facts: Facts) -> Iterator[str]:
    """Yield what a model is that a ring of keys in each layer cannot serve."""
    if facts.get("is_encoder_decoder") or is_encoder_decoder(facts.model_type):
        yield "encoder–decoder: its decoder attends to an encoder's output beside its own keys"
        return
    if is_masked_lm(facts.model_type) and not facts.get("is_decoder"):
        yield "encoder only: every token sees the later ones too, so nothing can be decoded"
        return
    parts = sorted(name for name in facts.fields if _PARTS.fullmatch(name) and facts.get(name))
    if parts:
        yield (
            f"several models in one: it is multimodal or composed of parts ({', '.join(parts[:3])})"
            f", and transformers knows no text model in it that could be exported by itself"
        )
        return
    if facts.get("add_cross_attention") or facts.get("cross_attention_hidden_size"):
        yield "cross-attention: it also attends to another model's output"
    known = is_causal_lm(facts.model_type)
    if known is False and not facts.get("auto_map") and not any(_unlike_rings(facts)):
        yield "no causal language model: transformers has no class of it that writes text"
        return
    yield from _unlike_rings(facts)


def unlike_rings(config: Any) -> str | None:
    """Return why the attention of a model cannot be computed with rings, None if nothing shows it.

    Args:
        config: of a text model, as transformers reads it.
    """
    return next(_unlike_rings(Facts({"model_type": config.model_type}, config)), None)


def _unlike_rings(facts: Facts) -> Iterator[str]:
    """Yield what the attention of a model does that a ring of keys in each layer cannot."""
    yield from _recurrent(facts)
    if facts.get("kv_lora_rank"):
        yield (
            "latent attention (MLA): it caches one compressed vector a token for all heads, not "
            "keys and values that a ring could hold"
        )
    if any(_INDEX_FIELDS.fullmatch(name) and facts.get(name) for name in facts.fields):
        yield (
            "sparse attention: an index chooses the keys that a query sees, by content, so no "
            "window of the last tokens holds them"
        )
    if "lsh" in _strings(facts.get("attn_layers")):
        yield "hashed attention (LSH): which keys a query sees depends on their content"
    if facts.get("attention_chunk_size") or "chunked_attention" in facts.layer_kinds:
        yield (
            "chunked attention: some layers see only the tokens of their own chunk of absolute "
            "positions, which a window that slides cannot follow"
        )
    if facts.get("attn_temperature_tuning") or _rope_has(facts, "llama_4_scaling_beta"):
        yield (
            "attention temperature: queries grow with the absolute position, which a graph that "
            "knows distances only cannot follow"
        )
    shared = facts.get("num_kv_shared_layers")
    if isinstance(shared, int) and shared > 0:
        yield (
            f"shared keys and values: the last {shared} of its {facts.num_layers} layers read "
            f"those of earlier layers, while each exported layer has a cache of its own"
        )
    if facts.get("lambda_std_dev") is not None:
        yield "differential attention: each layer attends twice and subtracts the results"


def _recurrent(facts: Facts) -> Iterator[str]:
    kinds = facts.layer_kinds
    stateful = [kind for kind in kinds if _STATEFUL.search(kind)]
    if stateful:
        names = ", ".join(dict.fromkeys(stateful))
        yield (
            f"recurrent hybrid: {len(stateful)} of its {len(kinds)} layers keep a recurrent or "
            f"convolutional state ({shortened(names, 50)}), which the exported caches do not carry"
        )
        return
    fields = sorted(name for name in facts.fields if _STATE_FIELDS.fullmatch(name))
    if fields and not kinds:
        hybrid = " hybrid" if facts.get("num_attention_heads") else ""
        yield (
            f"recurrent{hybrid}: {_stateful_layers(facts)} keep a recurrent or convolutional state "
            f"({shortened(fields[0], 30)} in config.json), which the exported caches do not carry"
        )


def _stateful_layers(facts: Facts) -> str:
    """Say how many layers have a state, where a configuration lists those that attend."""
    count, period = facts.num_layers, facts.get("attn_layer_period")
    attending = facts.get("attn_layer_indices") or facts.get("full_attn_idxs")
    if not isinstance(count, int):
        return "its layers"
    if isinstance(attending, list) and attending:
        return f"{count - len(set(attending))} of its {count} layers"
    if isinstance(period, int) and period > 0:
        offset = facts.get("attn_layer_offset")
        attend = len(range(offset if isinstance(offset, int) else 0, count, period))
        return f"{count - attend} of its {count} layers"
    return f"its {count} layers"


def _strings(value: Any) -> list[str]:
    return [x for x in value if isinstance(x, str)] if isinstance(value, (list, tuple)) else []


def _rope_has(facts: Facts, name: str) -> bool:
    tables = (facts.get("rope_parameters"), facts.get("rope_scaling"))
    return any(isinstance(table, dict) and table.get(name) for table in tables)
