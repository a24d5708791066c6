"""The weights of a graph: found in the checkpoint, named, written beside it, and attached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lminf_export.export.background_weights import BackgroundWeights
from lminf_export.export.onnx_dtypes import dtype_name
from lminf_export.export.passes import pipelines
from lminf_export.export.passes.choose_weights import Quantized, choose_weights
from lminf_export.export.passes.quantize_to_blocks import stored_initializers
from lminf_export.export.trace.tracing import Trace
from lminf_export.quantize import stored as quantized_weights
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.tensors.files import FILE_NAME, find_weights
from lminf_export.tensors.link import link_weights
from lminf_export.tensors.pieces import Converted
from lminf_export.tensors.stored import SourceTensor
from lminf_export.tensors.writing import write_pieces

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenWeights:
    """The weights files that were written or linked.

    Attributes:
        files: weights files by name, and the SHA-256 of what was written rather than linked.
        num_bytes: of all of them.
        full_stacks: names of stacks of matrices that a quantisation left in full.
        full_bytes: their bytes.
        quantized: the weights that were quantised.
    """

    files: dict[str, str | None]
    num_bytes: int
    full_stacks: tuple[str, ...] = ()
    full_bytes: int = 0
    quantized: tuple[Quantized, ...] = ()


def find_named_weights(
    trace: Trace, checkpoint: Mapping[str, SourceTensor]
) -> tuple[dict[str, SourceTensor], dict[str, tuple[str, ...]]]:
    """Match weights to the checkpoint; return tensors and all of a weight's names, by initializer.

    An initializer gets the name its tensor has in the bundle: the model's, and for tied weights
    the first of theirs that the checkpoint has.
    """
    checkpoint = trace.conversion.apply(checkpoint)
    model, initializers = trace.model, trace.model.graph.initializers
    names = {n: c for n, c in trace.weight_names.items() if n in initializers}
    shapes = {n: tuple(initializers[n].shape.numpy()) for n in names}  # type: ignore[union-attr]
    found = find_weights(checkpoint, names, shapes)
    stored_name = {n: _stored_name(candidates, checkpoint) for n, candidates in names.items()}
    pipelines.run(model, pipelines.named(stored_name))
    sources = {stored_name[n]: tensor for n, tensor in found.items()}
    return sources, {stored_name[n]: candidates for n, candidates in names.items()}


def link_files(
    model: ir.Model, sources: Mapping[str, SourceTensor], dtype: str, folder: Path
) -> WrittenWeights:
    """Put hard links to the checkpoint's files into a folder, and attach the weights in them."""
    stored = link_weights(folder, sources, dtype)
    pipelines.run(model, pipelines.attached(stored))
    paths = {tensor.path for tensor in stored.values()}
    sizes = [path.stat().st_size for path in paths]
    return WrittenWeights(dict.fromkeys(sorted(path.name for path in paths)), sum(sizes))


def weight_pieces(
    model: ir.Model,
    sources: Mapping[str, SourceTensor],
    aliases: Mapping[str, tuple[str, ...]],
    dtype: str,
    quantize: QuantizeConfig | None,
) -> tuple[list[Converted], list[Quantized] | None]:
    """Return the weights kept in full and those quantised, for which the graph is rewritten.

    The second is None, not empty, where nothing was to be quantised.
    """
    quantized: list[Quantized] | None = None
    if quantize is not None:
        choices = choose_weights(model, aliases, sources, quantize, dtype)
        pipelines.run(model, pipelines.quantized(choices, quantize))
        quantized = [choice.piece for choice in choices]
    kept = {n: tensor for n, tensor in sources.items() if n in model.graph.initializers}
    types = {n: _stored_type(model.graph.initializers[n], dtype) for n in kept}
    return [Converted(n, tensor, types[n]) for n, tensor in kept.items()], quantized


def write_files(
    model: ir.Model,
    full: Sequence[Converted],
    quantized: Sequence[Quantized] | None,
    path: Path,
    background: BackgroundWeights | None,
    progress: Callable[[int], None],
) -> WrittenWeights:
    """Write the weights to one file, or take the one written in the background; attach them.

    Args:
        model: the graph that reads them.
        full: weights kept in full.
        quantized: those quantised, None where nothing was to be.
        path: the file.
        background: the file, if it is being written already.
        progress: receives the bytes written.
    """
    pieces = [*full, *(quantized or ())]
    if background is not None and background.holds(pieces):
        stored, digest = background.result(progress)
    else:
        if background is not None:
            logger.info("the graph needs other weights than foreseen; they are written again")
            background.stop()
        stored, digest = write_pieces(path, pieces, progress)
    parts = stored_initializers(model, [piece.name for piece in quantized or ()], stored)
    attached = {piece.name: stored[piece.name] for piece in full} | parts
    pipelines.run(model, pipelines.attached(attached))
    stacks = [p for p in full if quantized is not None and len(p.tensor.shape) > 2]
    return WrittenWeights(
        files={path.name: digest},
        num_bytes=path.stat().st_size,
        full_stacks=tuple(piece.name for piece in stacks),
        full_bytes=sum(stored[piece.name].length for piece in stacks),
        quantized=tuple(quantized or ()),
    )


def weights_name(quantize: QuantizeConfig | None) -> str:
    """Return the name of a bundle's weights file."""
    return FILE_NAME if quantize is None else quantized_weights.FILE_NAME


def _stored_type(value: ir.Value, dtype: str) -> str:
    """Return a weight's element type: some routers compute in float32 whatever the model does."""
    return dtype if value.dtype is None else dtype_name(value.dtype)


def _stored_name(candidates: tuple[str, ...], checkpoint: Mapping[str, SourceTensor]) -> str:
    return next(name for name in candidates if name in checkpoint)
