"""Settings that architectures of GGUF have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lminf_export.checkpoint.gguf.metadata import Gguf
from lminf_export.errors import ModelError, shortened
from lminf_export.models.expert_facts import TOP_K_NAMES

Settings = dict[str, Any]
RMS_EPS, LAYER_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
# A field that a model's configuration does not have.
LEFT_OUT = object()


@dataclass(frozen=True)
class Architecture:
    """How an architecture of GGUF becomes a model of transformers.

    Attributes:
        settings: the fields of config.json besides those that all have, `model_type` among them;
            LEFT_OUT for one that this model does not have.
        eps: transformers' name of the epsilon of the norms.
        eps_key: GGUF's.
        rotary: the rows of queries and keys are stored in pairs, as `halves_from_pairs` says.
        shifted_norms: norms are stored with 1 added.
        fused: order of fused projections: "", "heads" or "groups", as in `layout`.
        has_head_dim: whether config.json has a `head_dim`.
    """

    settings: Callable[[Gguf], Settings]
    eps: str = "rms_norm_eps"
    eps_key: str = RMS_EPS
    rotary: bool = False
    shifted_norms: bool = False
    fused: str = ""
    has_head_dim: bool = True


def head_dimension(gguf: Gguf, hidden: int, heads: int) -> int:
    """Return the elements of a head.

    Raises:
        ModelError: those of keys and of values differ.
    """
    key, value = (gguf.integer(f"attention.{name}_length") for name in ("key", "value"))
    if key is not None and value is not None and key != value:
        raise ModelError(
            f"GGUF file {shortened(gguf.name)} has keys of {key} and values of {value} elements "
            f"in a head; equal ones are read"
        )
    found = key or hidden // heads
    if not 0 < found <= 2**14:
        raise ModelError(f"GGUF file {shortened(gguf.name)} has heads of {found} elements")
    return found


def experts(gguf: Gguf, count: str = "num_experts") -> Settings:
    """Return how many experts there are, under a name, and how many a token takes."""
    return {
        count: gguf.required("expert_count", 1, 2**15),
        TOP_K_NAMES[0]: gguf.required("expert_used_count", 1, 2**15),
    }


def expert_width(gguf: Gguf) -> int:
    """Return the inner width of an expert."""
    layers = range(gguf.num_layers)
    names = (f"blk.{layer}.ffn_down_exps.weight" for layer in layers)
    first = next((name for name in names if name in gguf.tensors), None)
    if first is None:
        raise ModelError(f"GGUF file {shortened(gguf.name)} lacks the tensors of its experts")
    return gguf.tensors[first].shape[-1]


def sliding(gguf: Gguf) -> Settings:
    """Return the window of sliding layers, and which those are where the file says so."""
    window = gguf.integer("attention.sliding_window")
    found: Settings = {"sliding_window": window or None}
    pattern = gguf.flags("attention.sliding_window_pattern")
    if pattern is not None:
        found["layer_types"] = [_layer_type(is_sliding) for is_sliding in pattern]
    return found


def _layer_type(is_sliding: bool) -> str:
    return "sliding_attention" if is_sliding else "full_attention"
