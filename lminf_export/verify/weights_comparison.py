"""Compares a bundle's weights, byte by byte, with those an export makes of the original model's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.records import TensorBlocks
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.quantize.kept import kept_type
from lminf_export.quantize.reading import DequantizedChannels, DequantizedWeight
from lminf_export.quantize.stored import (
    BLOCK_ELEMENTS,
    ChannelWeight,
    QuantizedWeight,
    row_blocks,
)
from lminf_export.tensors.dtypes import BY_SAFETENSORS
from lminf_export.tensors.pieces import Converted, Piece, read_chunks
from lminf_export.tensors.stored import SourceTensor, StoredTensor
from lminf_export.verify.bundle_weights import bundle_weights


def differing_weights(bundle: Bundle, original: Checkpoint) -> tuple[str, ...]:
    """Return the names of the bundle's tensors that differ in a bit from an export of the original.

    Raises:
        ModelError: the source's checkpoint is damaged or incomplete.
    """
    dtype, skeleton = bundle.manifest.dtype, original.skeleton
    quantization = bundle.manifest.quantization
    blocks = {} if quantization is None else quantization.tensors
    converted = skeleton.conversion.apply(original.tensors)
    wanted = _with_tied_names(converted, skeleton)
    return tuple(
        name
        for name, tensor in bundle_weights(bundle, skeleton).items()
        if name not in wanted
        or not _is_made_of(name, tensor, wanted[name], dtype, blocks.get(name))
    )


def _with_tied_names(
    tensors: Mapping[str, SourceTensor], skeleton: Skeleton
) -> dict[str, SourceTensor]:
    """Return a checkpoint's tensors under every name the model has for them."""
    named = dict(tensors)
    for group in skeleton.tied:
        known = [name for name in group if name in tensors]
        named.update(dict.fromkeys(group, tensors[known[0]]) if len(known) == 1 else {})
    return named


def _is_made_of(
    name: str, stored: SourceTensor, source: SourceTensor, dtype: str, blocks: TensorBlocks | None
) -> bool:
    """Return whether a bundle's weight equals, bit for bit, an export of a source tensor.

    Args:
        name: of the weight.
        stored: of `bundle_weights`.
        source: the original.
        dtype: the bundle's.
        blocks: how the weight was quantised, None where the manifest does not say it.
    """
    if stored.shape != source.shape:
        return False
    kind = BY_SAFETENSORS.get(stored.dtype)  # some weights stay float32
    piece: Piece = Converted(name, source, kind.name if kind else dtype)
    first = stored
    if isinstance(stored, DequantizedWeight):
        scales = BY_SAFETENSORS[stored.scales.dtype].name
        method = "range" if blocks is None else blocks.method
        if method == "calibrate":
            return _is_near(stored, source)
        if method == "keep" and kept_type(source) is None:
            return False
        piece = QuantizedWeight(
            name, source, stored.form, scales, stored.signed, method, offset_dtype=dtype
        )
        first = stored.packed
    if isinstance(stored, DequantizedChannels):
        piece = ChannelWeight(name, source, stored.kind, dtype)
        first = stored.packed
    assert isinstance(first, StoredTensor)
    found = np.memmap(first.path, np.uint8, "r", first.offset)
    start = 0
    for chunk in read_chunks(piece):
        wanted = chunk.reshape(-1)
        if not np.array_equal(found[start : start + wanted.size], wanted):
            return False
        start += wanted.size
    return True


# Of a calibrated row: squared error over squares. Rounding to 4 bits takes a tenth of it, and
# making up for other columns a few times as much.
_NEAR = 0.1


def _is_near(stored: DequantizedWeight, source: SourceTensor) -> bool:
    """Say whether a weight that was calibrated on a text is near the source, row by row.

    Its integers depend on the text, which is not in the bundle.
    """
    columns = stored.shape[1]
    count = max(1, BLOCK_ELEMENTS // columns)
    pairs = zip(row_blocks(stored, count), row_blocks(source, count), strict=True)
    return all(
        bool(((found - wanted).square().sum(1) <= _NEAR * wanted.square().sum(1)).all())
        for found, wanted in pairs
    )
