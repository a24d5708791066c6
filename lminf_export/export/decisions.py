"""Settings that the user left open: how an export decides them, and the notices about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.out import OutTarget
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.checkpoint.source import Source
from lminf_export.errors import ConfigError, InputError, shortened
from lminf_export.export.options import CHOICES, LINK
from lminf_export.export.weight_files import WrittenWeights
from lminf_export.models.base import AttentionPlan
from lminf_export.models.key_bias import named_key_biases
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import (
    AUTO_KV_CACHE_DTYPE,
    DEFAULT_WINDOW_CAP,
    LambdaConfig,
    require_one_of,
    ring_capacity,
)
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.tensors.dtypes import DTYPE_ALIASES

LINK_NOTICE = (
    "the weights are hard links to the source model's files, the same bytes on the same disk: "
    "changing those files in place changes the bundle; copying the bundle frees it from them"
)
# More memory than one machine that decodes has; on one that has more, its own is the limit.
_LARGEST_CACHE = 2**40
# Norm of the bias of one layer's keys from which on it would fill a row's 127 steps by itself.
LARGE_KEY_BIAS = 50.0
BFLOAT16_NOTICE = (
    "bfloat16 graphs are for engines and GPUs: onnxruntime's CPU provider does not run them"
)


def default_window(asked: int | None, training_length: int | None) -> tuple[int, list[str]]:
    """Return the window to use, and what to tell the user about it."""
    if asked is not None:
        return asked, list(_long_window_notices(asked, training_length))
    if training_length is None:
        raise ConfigError(
            "window_size: this model's configuration names no training length; "
            "give --window-size, at most the length it was trained on"
        )
    if training_length <= DEFAULT_WINDOW_CAP:
        return training_length, []
    notice = (
        f"the window is {DEFAULT_WINDOW_CAP} tokens, not the training length of "
        f"{training_length}: every token pays for the window; --window-size sets it"
    )
    return DEFAULT_WINDOW_CAP, [notice]


def _long_window_notices(window: int, training_length: int | None) -> Iterable[str]:
    if training_length is not None and window > training_length:
        yield (
            f"the window of {window} tokens is longer than the {training_length} the model was "
            f"first trained on: distances beyond that are new to it, unless it was trained further"
        )


def check_weights(asked: str, quantize: QuantizeConfig | None) -> None:
    """Raise ConfigError where weights cannot be written in the way asked for."""
    require_one_of("weights", asked, CHOICES["weights"])
    if asked == LINK and quantize is not None:
        raise ConfigError(
            "weights='link': quantised weights are new ones and must be written; use 'copy'"
        )


def check_calibration(text: str | Path | None, quantize: QuantizeConfig | None) -> None:
    """Raise an error where a calibration is asked for that cannot be.

    Raises:
        ConfigError: weights are not quantised to int4.
        InputError: the text cannot be read.
    """
    if text is None:
        return
    if quantize is None or quantize.weights != "int4":
        raise ConfigError("calibrate: only int4 weights are calibrated; quantise to int4")
    try:
        with open(text, "rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror}") from None


def check_linked(asked: str, source: Source) -> None:
    """Raise ConfigError where links to a model's weights are asked for that a graph cannot use."""
    if asked == LINK and source.gguf is not None:
        raise ConfigError(
            f"weights='link': the weights of {shortened(source.name)} are decoded from GGUF and "
            f"must be written; use 'copy'"
        )


def default_dtype(asked: str | None, target: OutTarget) -> Any:
    """Return the element type to use: the one asked for, or what the products need."""
    if asked is None:
        return "float16" if target.engine_name else "float32"
    full = next((full for alias, full in DTYPE_ALIASES.items() if alias == asked), asked)
    require_one_of("dtype", full, CHOICES["dtype"])
    return full


def decide_kv_cache_dtype(asked: str, dtype: str, target: OutTarget) -> Any:
    """Return the element type of the rings where it is not the export's, else None.

    Raises:
        ConfigError: an unknown type, or one that the products cannot have.
    """
    require_one_of("kv_cache_dtype", asked, CHOICES["kv_cache_dtype"])
    if asked == AUTO_KV_CACHE_DTYPE:
        return None
    if dtype == "bfloat16" and target.engine_name is None:
        raise ConfigError(
            f"kv_cache_dtype={asked!r}: is for graphs in float32 or float16, found "
            "dtype='bfloat16'; choose one of them or leave it out"
        )
    return asked


def key_bias_notices(
    checkpoint: Checkpoint, kv_cache_dtype: str | None, plan: AttentionPlan
) -> Iterable[str]:
    """Yield what to tell the user about biases of keys, where the rings round keys.

    Raises:
        ConfigError: a bias that is rounded with its keys would leave them no precision.
    """
    if kv_cache_dtype is None:
        return
    skeleton = checkpoint.skeleton
    tensors = skeleton.conversion.apply(checkpoint.tensors)
    largest = 0.0
    for name, is_of_all in named_key_biases(skeleton.model):
        if name in tensors:
            bias = torch.cat([block.flatten() for block in tensors[name].blocks()])
            own = _of_keys(bias, skeleton.model.config) if is_of_all else bias
            largest = max(largest, float(own.float().norm()))
    if plan.key_bias_in_rings and largest >= LARGE_KEY_BIAS:
        raise ConfigError(
            f"kv_cache_dtype={kv_cache_dtype!r}: a layer's keys hold a bias of norm {largest:.0f}, "
            f"from {LARGE_KEY_BIAS:.0f} on too large to be rounded with them, and the plugin has "
            "no rings without it; leave the option out, or export without an engine"
        )
    if plan.key_bias_in_rings and largest > 0:
        yield (
            f"a layer's keys hold a bias of norm {largest:.2g}, which the engine's int8 rings "
            "round with them; what that costs, `lminf validate --model MODEL --text FILE` measures"
        )
    elif largest >= LARGE_KEY_BIAS:
        yield (
            f"a layer's keys hold a bias of norm {largest:.0f}; the int8 rings keep biases out of "
            f"what they round, so it costs time and no precision; what rounding costs, `lminf "
            f"validate --model MODEL --text FILE` measures"
        )


def _of_keys(bias: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the second third of every head's part of a bias of queries, keys and values."""
    return bias.view(config.num_attention_heads, 3, -1)[:, 1]


def dtype_notices(asked: str | None, chosen: str) -> Iterable[str]:
    """Yield what to tell the user about the element type."""
    if chosen == "bfloat16":
        yield BFLOAT16_NOTICE
    if asked is None and chosen == "float16":
        yield "an engine is asked for, so weights and caches are float16; --dtype sets it"


def weight_notices(written: WrittenWeights) -> Iterable[str]:
    """Yield what to tell the user about weights that were asked to be quantised."""
    if written.full_stacks:
        yield (
            f"the experts' weights are not quantised: {human_bytes(written.full_bytes)} of the "
            f"{human_bytes(written.num_bytes)} of weights stay as they are"
        )


def check_cache_size(
    contract: GraphContract,
    settings: LambdaConfig,
    batch_size: int,
    training_length: int | None,
    total: int | None = None,
) -> None:
    """Refuse caches that cannot be loaded.

    A bundle may be for a larger machine than this one, so a window that the model was trained on
    may take up to 1 TiB; a longer one, which only costs, may take this machine's memory.

    Args:
        contract: with the caches of one sequence.
        settings: window, sinks and chunk that they follow from.
        batch_size: sequences that an engine reserves caches for; 1 for the graph alone.
        training_length: of the model, where it is known.
        total: bytes of memory of this machine; by default it is asked.

    Raises:
        ConfigError: with the size, the window that fits and what to change.
    """
    total = psutil.virtual_memory().total if total is None else total
    trained = training_length is None or settings.window_size <= training_length
    limit = max(total, _LARGEST_CACHE) if trained else total
    needed = contract.cache_bytes() * batch_size
    if needed <= limit:
        return
    batch = f" for max_batch_size={batch_size}" if batch_size > 1 else ""
    window = _fitting_window(contract, settings, limit // batch_size)
    fits = (
        f"window_size up to {window} fits"
        if window
        else "no window fits: lower chunk_size, num_sink_tokens, max_batch_size or the model's own "
        "sliding_window"
    )
    raise ConfigError(
        f"window_size={settings.window_size}: with chunk_size={settings.chunk_size} and "
        f"num_sink_tokens={settings.num_sink_tokens} the caches take {human_bytes(needed)}{batch}, "
        f"at most {human_bytes(limit)} can be loaded; {fits}"
    )


def _fitting_window(contract: GraphContract, settings: LambdaConfig, limit: int) -> int:
    """Return the largest window whose caches take at most `limit` bytes, 0 if none does."""

    def fits(window: int) -> bool:
        ring = ring_capacity(window, settings.chunk_size)
        layers = tuple(
            replace(layer, window_size=window, ring_capacity=ring)
            if layer.window_size == settings.window_size
            else layer
            for layer in contract.layers
        )
        return replace(contract, layers=layers).cache_bytes() <= limit

    low, high = 0, settings.window_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def memory_notices(contract: GraphContract, settings: LambdaConfig) -> Iterable[str]:
    """Yield what to tell the user about caches that this machine could not hold."""
    needed = contract.cache_bytes()
    available = psutil.virtual_memory().available
    if needed > available:
        window = _fitting_window(contract, settings, available)
        yield (
            f"one sequence's cache takes {human_bytes(needed)}, the machine that exported it had "
            f"{human_bytes(available)} of memory available; a smaller --window-size helps"
            + (f", up to {window}" if window else "")
        )
