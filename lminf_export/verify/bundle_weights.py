"""The weights of a bundle as a model of transformers has them: named, dequantised, in full."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.quantize.reading import dequantize_stored
from lminf_export.quantize.stored import QUANTIZED
from lminf_export.tensors.files import FILE_NAME as CHECKPOINT_NAME
from lminf_export.tensors.files import read_header
from lminf_export.tensors.pieces import Converted
from lminf_export.tensors.stored import SourceTensor, StoredTensor
from lminf_export.tensors.writing import write_pieces


def stored_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """Return the tensors of a bundle's weights files, by the names they have there."""
    files = bundle.manifest.files_of("weights")
    return {n: t for file in files for n, t in read_header(bundle.path / file).items()}


def quantized_names(bundle: Bundle) -> frozenset[str]:
    """Return the names of the weights that a bundle stores quantised."""
    return frozenset(
        n.removesuffix(QUANTIZED) for n in stored_tensors(bundle) if n.endswith(QUANTIZED)
    )


def bundle_weights(bundle: Bundle, skeleton: Skeleton) -> dict[str, SourceTensor]:
    """Return a bundle's weights by the model's names, quantised ones dequantised as they are read.

    Args:
        bundle: quantised or not.
        skeleton: of its model.

    Raises:
        ModelError: the weights file does not fit the model.
    """
    stored, quantization = stored_tensors(bundle), bundle.manifest.quantization
    shapes = skeleton.shapes
    if bundle.manifest.linked_files:
        # The source's files have names of their own, and may hold tensors that are not used.
        named = skeleton.conversion.apply(dict(stored))
        return {name: tensor for name, tensor in named.items() if name in shapes}
    if quantization is None:
        return dict(stored)
    signed = quantization.form == "qdq"
    return dequantize_stored(stored, shapes, quantization.block_size, signed)


def _are_stored_apart(tensors: Mapping[str, SourceTensor], skeleton: Skeleton) -> bool:
    """Return whether weights that the model ties are stored twice: quantised and in full."""
    return any(sum(name in tensors for name in group) > 1 for group in skeleton.tied)


@contextmanager
def dequantized_folder(bundle: Bundle, skeleton: Skeleton) -> Iterator[Path]:
    """Write a temporary model folder of the bundle's weights, dequantised to float32.

    Raises:
        ModelError: the weights file does not fit the model.
    """
    tensors = bundle_weights(bundle, skeleton)
    with tempfile.TemporaryDirectory(prefix="lminf-") as name:
        folder = Path(name)
        config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        if _are_stored_apart(tensors, skeleton):
            config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        pieces = [Converted(n, tensor, "float32") for n, tensor in tensors.items()]
        write_pieces(folder / CHECKPOINT_NAME, pieces)
        yield folder


@contextmanager
def rounded_activations(model: Any, names: frozenset[str], block_size: int) -> Iterator[None]:
    """Round the inputs of a model's quantised projections, as accuracy level 4 does.

    Args:
        model: of transformers, its weights dequantised.
        names: the weights that are quantised.
        block_size: of the weights, and of the activations.
    """
    quantized = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args: (round_blocks(args[0], block_size), *args[1:])
        )
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in quantized
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def round_blocks(x: Tensor, block_size: int) -> Tensor:
    """Round activations (…, K) to int8, each block of K by its largest element."""
    columns = x.shape[-1]
    padded = nn.functional.pad(x, (0, -columns % block_size)).unflatten(-1, (-1, block_size))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    integers = torch.where(scale > 0, padded / scale, torch.zeros_like(padded)).round()
    return (integers * scale).flatten(-2)[..., :columns].to(x.dtype)
