"""Rotary settings of a GGUF model, as transformers' `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.checkpoint.gguf.metadata import Gguf
from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.gguf_blocks import GgufTensor

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
DEFAULT_THETA = 10000.0
_MOST_FACTORS = 2**14
# Of models that are scaled as Llama 3 is; a file holds the factors that they make.
_LLAMA3_LENGTHS = (8192, 4096, 2048, 16384, 32768)
_LLAMA3_BANDS = ((1.0, 4.0), (1.0, 1.5), (1.0, 2.0), (1.0, 8.0))


def rope_parameters(gguf: Gguf, head_dim: int, theta: float | None = None) -> dict[str, Any]:
    """Return the rotary settings of a model.

    Args:
        gguf: the model.
        head_dim: elements of a head.
        theta: base of the frequencies; by default that of the file.

    Raises:
        ModelError: a scaling of a kind that is not read.
    """
    base = theta or gguf.number("rope.freq_base") or DEFAULT_THETA
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    turned = gguf.integer("rope.dimension_count")
    if turned is not None and turned != head_dim:
        if not 0 < turned < head_dim or turned % 2:
            raise ModelError(
                f"GGUF file {shortened(gguf.name)}: {gguf.own('rope.dimension_count')} is {turned} "
                f"with heads of {head_dim}; an even number up to that is expected"
            )
        found["partial_rotary_factor"] = turned / head_dim
    width = (turned or head_dim) // 2
    if FREQS in gguf.tensors:
        return {**found, **_of_factors(gguf, base, width)}
    if LONG in gguf.tensors and SHORT in gguf.tensors:
        return {**found, **_longrope(gguf, width)}
    kind = gguf.text("rope.scaling.type") or "none"
    factor = gguf.number("rope.scaling.factor") or gguf.number("rope.scale_linear")
    if kind == "none" or factor is None or factor in (0.0, 1.0):
        # Old files give a linear factor without a type.
        if kind != "none" or factor in (None, 0.0, 1.0):
            return found
        kind = "linear"
    if kind == "linear":
        return {**found, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {**found, **_yarn(gguf, factor)}
    raise ModelError(
        f"GGUF file {shortened(gguf.name)} scales rotations by {shortened(repr(kind))}; linear, "
        f"yarn, and factors in tensors are read"
    )


def _yarn(gguf: Gguf, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = gguf.integer("rope.scaling.original_context_length")
    if original is not None:
        found["original_max_position_embeddings"] = original
    names = {
        "attention_factor": ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"),
        "beta_fast": ("rope.scaling.yarn_beta_fast",),
        "beta_slow": ("rope.scaling.yarn_beta_slow",),
    }
    for name, keys in names.items():
        value = next((x for x in map(gguf.number, keys) if x is not None), None)
        if value is not None:
            found[name] = value
    return found


def _longrope(gguf: Gguf, width: int) -> dict[str, Any]:
    """Return the settings of models that carry factors for short and for long texts."""
    longest = gguf.required("context_length", 1, 2**40)
    original = gguf.integer("rope.scaling.original_context_length") or longest
    found = {
        "rope_type": "longrope",
        "long_factor": _factors(gguf, LONG, width),
        "short_factor": _factors(gguf, SHORT, width),
        "original_max_position_embeddings": original,
        "factor": longest / original,
    }
    attention = gguf.number("rope.scaling.attn_factor")
    return found if attention is None else {**found, "attention_factor": attention}


def _of_factors(gguf: Gguf, base: float, width: int) -> dict[str, Any]:
    """Return the settings that make the factors of a file: those of Llama 3, or the factors."""
    factors = np.array(_factors(gguf, FREQS, width))
    if np.all(factors == 1.0):
        return {}
    largest = float(factors.max())
    for factor in sorted({largest, float(2 ** math.ceil(math.log2(max(largest, 1.0)))), 32.0, 8.0}):
        for original in _LLAMA3_LENGTHS:
            for low, high in _LLAMA3_BANDS:
                made = _llama3_factors(base, width, factor, low, high, original)
                if np.allclose(made, factors, rtol=1e-5):
                    return {
                        "rope_type": "llama3",
                        "factor": factor,
                        "low_freq_factor": low,
                        "high_freq_factor": high,
                        "original_max_position_embeddings": original,
                    }
    longest = gguf.required("context_length", 1, 2**40)
    return {
        "rope_type": "longrope",
        "long_factor": factors.tolist(),
        "short_factor": factors.tolist(),
        "original_max_position_embeddings": longest,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _llama3_factors(
    base: float, width: int, factor: float, low: float, high: float, original: int
) -> NDArray[np.float64]:
    """Return what the wavelengths (width,) of a model are multiplied by."""
    turns = original * base ** (-np.arange(width) / width) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _factors(gguf: Gguf, name: str, width: int) -> list[float]:
    tensor: GgufTensor = gguf.tensors[name]
    if tensor.shape != (width,) or width > _MOST_FACTORS:
        raise ModelError(
            f"tensor {name} of GGUF file {shortened(gguf.name)} has shape {list(tensor.shape)}; "
            f"{[width]} is expected"
        )
    tensor.check_readable(name)
    # As the shortest decimals that are these numbers in 32 bits, which is how they were written.
    found = [float(str(value)) for value in tensor.rows(0, width).numpy()]
    if not all(math.isfinite(x) and x > 0 for x in found):
        raise ModelError(f"tensor {name} of GGUF file {shortened(gguf.name)} is damaged")
    return found
