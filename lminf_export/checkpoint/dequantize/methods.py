"""Quantised checkpoints as plain ones: every tensor decoded when it is written, a block at a time.

`quant_method` in a checkpoint's `quantization_config` selects the module that reads it. Only
weights are decoded: a model that also quantises its activations is exported with them in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lminf_export.checkpoint.dequantize import bitnet, fp4, mxfp4, packed, scaled
from lminf_export.checkpoint.dequantize.common import Found
from lminf_export.errors import ModelError, shortened
from lminf_export.tensors.stored import RawTensor, SourceTensor

Finder = Callable[[Mapping[str, RawTensor], Mapping[str, Any]], Found]


def _find_fp8(checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any]) -> Found:
    if any(tensor.dtype == "I8" for tensor in checkpoint.values()):
        raise ModelError(
            "this FP8 checkpoint also has 4-bit floats packed into int8, which are not read; "
            "export the unquantised checkpoint instead"
        )
    return scaled.find(checkpoint, settings)


def _find_compressed(checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any]) -> Found:
    groups = (settings.get("config_groups") or {}).values()
    formats = {settings.get("format"), *(group.get("format") for group in groups)}
    formats -= {None, "dense", "mixed-precision"}
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    unread = sorted(formats - _COMPRESSED.keys())
    if unread or sparsity != "dense" or settings.get("transform_config"):
        what = ", ".join(unread) or (
            f"sparsity {sparsity}" if sparsity != "dense" else "transforms"
        )
        raise ModelError(
            f"compressed-tensors checkpoints are read as {', '.join(sorted(_COMPRESSED))}; this "
            f"one has {what}: export the unquantised checkpoint instead"
        )
    finders = [finder for name, finder in _COMPRESSED.items() if name in formats]
    return _one_after_another(checkpoint, finders or [scaled.find], {})


def _one_after_another(
    checkpoint: Mapping[str, RawTensor], finders: Iterable[Finder], settings: Mapping[str, Any]
) -> Found:
    """Let each finder see what those before it have left."""
    found = Found()
    for finder in dict.fromkeys(finders):
        left = {name: x for name, x in checkpoint.items() if name not in found.used}
        more = finder(left, settings)
        found.tensors.update(more.tensors)
        found.used.update(more.used)
    return found


def _find_modelopt(checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any]) -> Found:
    algorithm = settings.get("quant_algo")
    if algorithm not in MODELOPT_ALGORITHMS:
        raise ModelError(
            f"modelopt checkpoints are read as {', '.join(MODELOPT_ALGORITHMS)}; this one has "
            f"quant_algo {shortened(str(algorithm), 40)}: export the unquantised checkpoint instead"
        )
    return _one_after_another(checkpoint, (fp4.find_modelopt, scaled.find), {})


# MIXED_PRECISION names one of the others for each layer.
MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", "NVFP4", "NVFP4_AWQ")
# In the order in which they look: the scales of FP4 are numbers of 8 bits themselves.
_COMPRESSED: dict[str, Finder] = {
    "nvfp4-pack-quantized": fp4.find_compressed,
    "mxfp4-pack-quantized": fp4.find_compressed,
    "float-quantized": scaled.find,
    "int-quantized": scaled.find,
    "naive-quantized": scaled.find,
    "pack-quantized": packed.find_pack_quantized,
}
_FINDERS: dict[str, Finder] = {
    "awq": packed.find_awq,
    "bitnet": bitnet.find,
    "compressed-tensors": _find_compressed,
    "fbgemm_fp8": _find_fp8,
    "fp8": _find_fp8,
    "gptq": packed.find_gptq,
    "modelopt": _find_modelopt,
    "modelopt_fp4": _find_modelopt,
    "mxfp4": mxfp4.find,
}


def check_quantization(settings: object, model: str) -> None:
    """Check the `quantization_config` of a configuration.

    Args:
        settings: the entry.
        model: the model as the user named it, for messages.

    Raises:
        ModelError: it is a method that is not read.
    """
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(method, str) or method not in _FINDERS:
        if isinstance(settings, Mapping) and any(
            map(settings.get, ("load_in_4bit", "load_in_8bit"))
        ):
            method = "bitsandbytes"
        raise ModelError(
            f"model {model!r} is quantised ({method or 'unknown'}), which is not read (read are "
            f"{', '.join(sorted(_FINDERS))}); export the unquantised checkpoint instead"
        )

    block = settings.get("weight_block_size")
    is_pair = isinstance(block, list) and len(block) == 2
    if block is not None and not (is_pair and all(isinstance(x, int) and x > 0 for x in block)):
        raise ModelError(
            f"weight_block_size={block!r} in the quantization_config of model {model!r}: must be "
            f"two whole numbers, rows and columns of a block"
        )
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(x, Mapping) for x in groups.values()):
        raise ModelError(f"config_groups in the quantization_config of model {model!r} is damaged")


def dequantize_checkpoint(
    checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any] | None
) -> dict[str, SourceTensor]:
    """Return a checkpoint with its quantised tensors under the names of the plain ones.

    Args:
        checkpoint: tensors by name.
        settings: its checked `quantization_config`, or None for a plain checkpoint.

    Raises:
        ModelError: parts are missing, do not fit, or are stored in a way that is not read.
    """
    if settings is None:
        return dict(checkpoint)
    found = _FINDERS[settings["quant_method"]](checkpoint, settings)
    plain = {name: x for name, x in checkpoint.items() if name not in found.used}
    return {**plain, **found.tensors}


def notices(checkpoint: Iterable[str], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the notices for the user about a quantised checkpoint.

    Args:
        checkpoint: names of its tensors.
        settings: its checked `quantization_config`.
    """
    decoded = (
        f"the checkpoint is quantised ({settings['quant_method']}): its weights are decoded, so "
        f"they take the room of --dtype, and activations are not quantised"
    )
    if not any(name.rpartition(".")[2] in scaled.CACHE_SCALES for name in checkpoint):
        return (decoded,)
    return (
        decoded,
        "the checkpoint has scales for keys and values in a cache of 8 bits, which are not read; "
        "--kv-cache-dtype int8 makes one with scales of its own",
    )
