"""The weights of a bundle as a model of transformers has them: named, dequantised, in full."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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
