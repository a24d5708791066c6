"""How large a weights file will be, from the shapes of a checkpoint alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from lminf_export.quantize.config import BITS, QuantizeConfig
from lminf_export.quantize.formats import BlockFormat
from lminf_export.quantize.kept import KeptType
from lminf_export.tensors.dtypes import item_size


def weight_bytes(
    shapes: Iterable[Sequence[int]], width: int, vocab_size: int, config: QuantizeConfig | None
) -> int:
    """Return the bytes of tensors of these shapes; an estimate where they are quantised.

    Args:
        shapes: of the checkpoint's tensors.
        width: bytes of an unquantised element.
        vocab_size: V; of two matrices of V rows one is the embedding, one alone is both.
        config: how matrices are quantised, None for not at all.
    """
    shapes = list(shapes)
    if config is None:
        return sum(prod(shape) for shape in shapes) * width
    tables = [shape for shape in shapes if len(shape) == 2 and shape[0] == vocab_size]
    rest = [shape for shape in shapes if shape not in tables]
    total = sum(_bytes(shape, config.weights, width, config) for shape in rest)
    # Of two tables one is looked up alone; one alone is the lm_head's, too.
    for shape in tables[1:]:
        total += _bytes(shape, config.table_kind(tied=False), width, config)
    return total + sum(_bytes(shape, config.lm_head_kind, width, config) for shape in tables[:1])


def kept_bytes(shape: Sequence[int], kind: KeptType, width: int) -> int:
    """Return the bytes of a matrix that keeps its own blocks.

    Args:
        shape: (N, K).
        kind: of its blocks.
        width: bytes of an unquantised element.
    """
    form = kind.form(shape[0], shape[1])
    scale = min(width, item_size(kind.scales))
    return prod(form.packed_shape) + prod(form.scales_shape) * (scale + width * form.offsets)


def _bytes(shape: Sequence[int], kind: str | None, width: int, config: QuantizeConfig) -> int:
    if kind is None or len(shape) != 2:
        return prod(shape) * width
    symmetric = config.is_symmetric(kind)
    form = BlockFormat(shape[0], shape[1], BITS[kind], config.block_size_of(kind), symmetric)
    searched = config.weights == "int4" and config.scales == "search" and config.form != "qdq"
    scale = 2 if searched else width
    zero_points = 0 if form.symmetric else prod(form.zero_points_shape)
    return prod(form.packed_shape) + prod(form.scales_shape) * scale + zero_points
