"""The weights of a bundle as a model of transformers has them: named, dequantised, in full."""

from __future__ import annotations

from collections.abc import Mapping

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.checkpoint.source import open_source
from lminf_export.models.remote_code import may_run_code
from lminf_export.quantize.names import OFFSETS, QUANTIZED
from lminf_export.quantize.reading import dequantize_stored
from lminf_export.tensors.files import read_header
from lminf_export.tensors.stored import SourceTensor, StoredTensor
from lminf_export.verify.rounded_activations import RoundedInput


def stored_tensors(bundle: Bundle) -> dict[str, StoredTensor]:
    """Return the tensors of a bundle's weights files, by the names they have there."""
    files = bundle.manifest.files_of("weights")
    return {n: t for file in files for n, t in read_header(bundle.path / file).items()}


def rounded_inputs(bundle: Bundle, skeleton: Skeleton) -> dict[str, RoundedInput]:
    """Return what the weights meet that a bundle stores quantised, by all their names.

    Args:
        bundle: quantised or not.
        skeleton: of its model.
    """
    quantization, stored = bundle.manifest.quantization, stored_tensors(bundle)
    if quantization is None:
        return {}
    names = [name.removesuffix(QUANTIZED) for name in stored if name.endswith(QUANTIZED)]
    sizes = {name: blocks.block_size for name, blocks in quantization.tensors.items()}
    found = {
        name: RoundedInput(sizes.get(name, quantization.block_size), stored.get(name + OFFSETS))
        for name in names
    }
    for group in skeleton.tied:
        known = next((found[name] for name in group if name in found), None)
        if known is not None:
            found |= {name: known for name in group if name not in {*found, *stored}}
    return found


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
    sizes = {name: (b.bits, b.block_size) for name, b in quantization.tensors.items()}
    return dequantize_stored(stored, shapes, sizes, quantization.block_size, signed)


def _are_stored_apart(tensors: Mapping[str, SourceTensor], skeleton: Skeleton) -> bool:
    """Return whether weights that the model ties are stored twice: quantised and in full."""
    return any(sum(name in tensors for name in group) > 1 for group in skeleton.tied)


def reference_checkpoint(bundle: Bundle, original: Checkpoint) -> Checkpoint:
    """Return the model that defines the right logits: for a quantised bundle, its own weights.

    They are dequantised, in float32, when they are read.

    Raises:
        ModelError: the weights file does not fit the model.
    """
    if bundle.manifest.quantization is None:
        return original
    trusts = may_run_code(original.source.config)
    source, skeleton = open_source(bundle.path, trust_remote_code=trusts), original.skeleton
    tensors = bundle_weights(bundle, skeleton)
    if _are_stored_apart(tensors, skeleton):
        source.config.tie_word_embeddings = False
    skeleton = skeleton.of(source.config)
    return Checkpoint(source, tensors, skeleton, None, (), is_computed=True)
