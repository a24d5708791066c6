"""The config.json of a GGUF model."""

from __future__ import annotations

from lminf_export.checkpoint.gguf.architectures import ARCHITECTURES
from lminf_export.checkpoint.gguf.metadata import Gguf
from lminf_export.checkpoint.gguf.rope import rope_parameters
from lminf_export.checkpoint.gguf.settings import (
    LEFT_OUT,
    Architecture,
    Settings,
    head_dimension,
)
from lminf_export.errors import ModelError, shortened

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def find_architecture(gguf: Gguf) -> Architecture:
    """Return the architecture of a model.

    Raises:
        ModelError: it is not read, or the file holds something else than a model.
    """
    name = gguf.architecture
    kind = gguf.text("general.type") or "model"
    if name in ARCHITECTURES and kind == "model":
        return ARCHITECTURES[name]
    file = f"GGUF file {shortened(gguf.name)}"
    if kind != "model" or name == "clip":
        raise ModelError(
            f"{file} holds a {shortened(repr(kind if kind != 'model' else name))}, not a language "
            f"model"
        )
    # Without commas, so that a line has room for all.
    raise ModelError(
        f"GGUF architecture {shortened(repr(name), 24)} is not read; read are: "
        f"{' '.join(sorted(ARCHITECTURES))}"
    )


def model_config(gguf: Gguf) -> Settings:
    """Return the config.json of a model.

    Raises:
        ModelError: the architecture is not read, or its metadata is damaged.
    """
    architecture = find_architecture(gguf)
    shape = gguf.shape(_EMBEDDING)
    hidden = gguf.required("embedding_length", 1, 2**22)
    if len(shape) != 2 or shape[1] != hidden:
        raise ModelError(
            f"tensor {_EMBEDDING} of GGUF file {shortened(gguf.name)} has shape {list(shape)}, "
            f"embedding_length is {hidden}"
        )
    heads = gguf.required("attention.head_count", 1, 2**14)
    found: Settings = {
        "hidden_size": hidden,
        "num_hidden_layers": gguf.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.integer("attention.head_count_kv") or heads,
        "vocab_size": shape[0],
        "tie_word_embeddings": _HEAD not in gguf.tensors,
    }
    length, width = gguf.integer("context_length"), gguf.integer("feed_forward_length")
    found |= {"max_position_embeddings": length} if length else {}
    found |= {"intermediate_size": width} if width else {}
    head_dim = head_dimension(gguf, hidden, heads)
    found |= {"head_dim": head_dim} if architecture.has_head_dim else {}
    found["rope_parameters"] = rope_parameters(gguf, head_dim)
    eps = gguf.number(architecture.eps_key)
    found |= {architecture.eps: eps} if eps is not None else {}
    for name in ("bos", "eos", "pad"):
        key = "padding" if name == "pad" else name
        token = gguf.integer(f"tokenizer.ggml.{key}_token_id")
        found[f"{name}_token_id"] = token if token is None or 0 <= token < shape[0] else None
    found |= architecture.settings(gguf)
    return {name: value for name, value in found.items() if value is not LEFT_OUT}
