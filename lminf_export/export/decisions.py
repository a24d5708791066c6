"""Settings that the user left open: how an export decides them, and the notices about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.out import OutTarget
from lminf_export.errors import ConfigError
from lminf_export.export.options import CHOICES, LINK
from lminf_export.export.weight_files import WrittenWeights
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import (
    AUTO_KV_CACHE_DTYPE,
    DEFAULT_WINDOW_CAP,
    require_one_of,
)
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.tensors.dtypes import DTYPE_ALIASES

LINK_NOTICE = (
    "the weights are hard links to the source model's files, the same bytes on the same disk: "
    "changing those files in place changes the bundle; copying the bundle frees it from them"
)
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
    if target.engine_name is not None:
        raise ConfigError(
            f"kv_cache_dtype={asked!r}: engines keep caches in float32, float16 or bfloat16 "
            "(TensorRT's cache update and the plugin take nothing else); leave it out, or export "
            f"without an engine: --out {target.directory}"
        )
    if dtype == "bfloat16":
        raise ConfigError(
            f"kv_cache_dtype={asked!r}: is for graphs in float32 or float16, found "
            "dtype='bfloat16'; choose one of them or leave it out"
        )
    return asked


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


def memory_notices(contract: GraphContract) -> Iterable[str]:
    """Yield what to tell the user about caches that this machine could not hold."""
    needed = contract.cache_bytes()
    available = psutil.virtual_memory().available
    if needed > available:
        yield (
            f"one sequence's cache takes {human_bytes(needed)}, the machine that exported it had "
            f"{human_bytes(available)} of memory available; a smaller --window-size helps"
        )
