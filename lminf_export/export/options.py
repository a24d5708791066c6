"""The options of an export: every name, default, choice and meaning, written once.

`lminf_export.export` takes the fields of `ExportOptions` as keyword arguments, the command line
makes its options of them, and checks read the choices from here. Imports no torch: a command that
only shows its help loads this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lminf_export.engine.options import BUILDERS, ELSEWHERE, EngineOptions
from lminf_export.operator.settings import (
    AUTO_KV_CACHE_DTYPE,
    DEFAULT_CHUNK_SIZE,
    DEFAULT_LAMBDA_LAYERS,
    DEFAULT_NUM_SINK_TOKENS,
    KV_CACHE_DTYPES,
    LAMBDA_LAYERS,
    ROPE_REGIMES,
    LambdaConfig,
)
from lminf_export.quantize.config import WEIGHT_TYPES, QuantizeConfig
from lminf_export.tensors.dtypes import MODEL_DTYPES

COPY, LINK = "copy", "link"
# Option → the values it may have, beside None where that is the default.
CHOICES: dict[str, tuple[str, ...]] = {
    "lambda_layers": LAMBDA_LAYERS,
    "rope_regime": ROPE_REGIMES,
    "dtype": MODEL_DTYPES,
    "quantize": WEIGHT_TYPES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "weights": (COPY, LINK),
    "builder": (*BUILDERS, ELSEWHERE),
}


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        model: folder, GGUF file, or id on the Hugging Face hub.
        out: the bundle's folder, or DIR/NAME.plan or DIR/NAME.onnx for a bundle DIR with that
            as its last product.
        tokenizer: folder with tokenizer and configuration of an ONNX model that has none beside it.
        num_sink_tokens: N, starting tokens that stay visible without end; may be 0.
        window_size: W, keys a query sees, its own included; by default the model's original
            training length, at most 4096.
        distance_limit: L ≥ W, distance at which the starting tokens appear; default W.
        chunk_size: largest number of new tokens in one step.
        lambda_layers: "full" gives sinks to layers that see everything by training; "all" also
            to layers trained with a sliding window, within that window.
        rope_regime: "short" or "long": the regime in which a rotary scaling that depends on the
            length of the text (dynamic NTK, longrope) is frozen; by default the one that fits
            the window.
        dtype: "float32", "float16" or "bfloat16", or "fp32", "fp16" or "bf16"; by default
            float16 with an engine and float32 without.
        quantize: "int4", "int8" or "fp8" for the weights of projections, or a `QuantizeConfig`
            with the details; by default they are not quantised.
        calibrate: a UTF-8 text file; int4 makes up for the rounding of weights on the inputs that
            it gives them. A few thousand tokens like those the model will read are enough.
        kv_cache_dtype: "int8" stores the caches of the window as integers with a scale for each
            token and key/value head, about a quarter of float32's bytes; "auto" stores them in
            dtype.
        weights: "copy" writes them into the bundle; "link" makes hard links to the model's own
            files there, which must be of the same type and on the same disk.
        builder: "tensorrt" or "tensorrt-rtx", needed only where both are installed; "none"
            writes the files from which TensorRT builds the engine on another machine.
        max_batch_size: largest batch of the engine; the ONNX graph takes any.
        engine_options: settings of TensorRT's builder; None for its own.
        revision: branch, tag or commit of a hub model.
        cache_dir: folder in which hub files are kept.
        trust_remote_code: run Python code of a model repository.
        allow_pickle: read `.bin` weights where there are no safetensors.
        lora: folder of a PEFT LoRA adapter to merge into the weights.
        force: replace an existing bundle.
        check: run the written graph on a few tokens and compare it with the unmodified model.
    """

    model: str | Path
    out: str | Path
    tokenizer: str | Path | None = None
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS
    window_size: int | None = None
    distance_limit: int | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE
    lambda_layers: str = DEFAULT_LAMBDA_LAYERS
    rope_regime: str | None = None
    dtype: str | None = None
    quantize: str | QuantizeConfig | None = None
    calibrate: str | Path | None = None
    kv_cache_dtype: str = AUTO_KV_CACHE_DTYPE
    weights: str = COPY
    builder: str | None = None
    max_batch_size: int = 1
    engine_options: EngineOptions | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    lora: str | Path | None = None
    force: bool = False
    check: bool = True

    @property
    def builder_settings(self) -> EngineOptions:
        """Settings of TensorRT's builder, the defaults where none were given."""
        return self.engine_options or EngineOptions()

    def lambda_config(self, window_size: int) -> LambdaConfig:
        """Return the settings of attention for a window, the one asked for or the default.

        Raises:
            ConfigError: one of them breaks a rule.
        """
        return LambdaConfig(
            window_size=window_size,
            num_sink_tokens=self.num_sink_tokens,
            distance_limit=self.distance_limit,  # type: ignore[arg-type]  # None means the window
            chunk_size=self.chunk_size,
            lambda_layers=self.lambda_layers,
            rope_regime=self.rope_regime,
        )


def signature_with_options(
    function: Callable[..., Any], names: Collection[str] | None = None
) -> inspect.Signature:
    """Return a function's signature with options of an export in the place of `**options`.

    Args:
        function: takes model, out and progress, and the options by their names.
        names: of the options; all by default.
    """
    written = inspect.signature(function)
    model, out, progress = (written.parameters[name] for name in ("model", "out", "progress"))
    options = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(ExportOptions).parameters.items()
        if name not in ("model", "out") and (names is None or name in names)
    ]
    return written.replace(parameters=[model, out, *options, progress])
