"""The options of a rewrite: those of an export that mean something for a finished graph."""

from __future__ import annotations

from dataclasses import fields

from lminf_export.errors import ConfigError
from lminf_export.export.options import ExportOptions

# Options of an export that a rewrite has too.
REWRITE_OPTIONS = (
    "tokenizer",
    "num_sink_tokens",
    "window_size",
    "distance_limit",
    "chunk_size",
    "lambda_layers",
    "rope_regime",
    "weights",
    "builder",
    "max_batch_size",
    "engine_options",
    "force",
    "check",
)
_REASONS = {
    "dtype": "a graph's element type stays as it is; convert the graph before",
    "quantize": "a graph's weights stay as they are; quantise the graph before, or export its "
    "checkpoint",
    "calibrate": "a graph's weights stay as they are",
    "kv_cache_dtype": "a rewritten graph has caches of its own element type",
    "lora": "an adapter is merged into a checkpoint; export the checkpoint with it",
    "revision": "an ONNX model is read from this machine",
    "cache_dir": "an ONNX model is read from this machine",
    "trust_remote_code": "a graph needs no code of a repository",
    "allow_pickle": "a graph has no pickles",
}


def check_options(options: ExportOptions) -> None:
    """Refuse options that mean nothing for a finished graph.

    Raises:
        ConfigError: naming one, and what to do instead.
    """
    for field in fields(ExportOptions):
        if field.name in ("model", "out", *REWRITE_OPTIONS):
            continue
        if getattr(options, field.name) != field.default:
            raise for_checkpoints_only(field.name, field.name)


def for_checkpoints_only(name: str, field: str) -> ConfigError:
    """Return the refusal of an option, for the reason that a field of `ExportOptions` has."""
    return ConfigError(
        f"{name}: is for checkpoints, and --model is an ONNX model: {_REASONS[field]}"
    )
