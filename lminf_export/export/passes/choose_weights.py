"""Which weights of a graph are quantised, and who reads them; nothing is edited here.

Works on what `pipelines.optimize` leaves: every projection is a Gemm with transB on an initializer
without data. That holds for fused projections as well, whose weight is one initializer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from lminf_export.export.passes.editing import is_op
from lminf_export.models.expert_facts import is_router_weight
from lminf_export.quantize.config import BITS, NARROW, QuantizeConfig
from lminf_export.quantize.formats import BlockFormat
from lminf_export.quantize.kept import KeptType, kept_type
from lminf_export.quantize.stored import ChannelWeight, QuantizedWeight, fits_half, kept_piece
from lminf_export.tensors.stored import SourceTensor

Quantized: TypeAlias = QuantizedWeight | ChannelWeight


@dataclass(frozen=True)
class WeightChoice:
    """A weight that is to be quantised.

    Attributes:
        name: of its initializer.
        products: the Gemm nodes that multiply by it.
        lookups: the Gather nodes that look rows up in it and are to read it quantised.
        piece: how it is stored. Its name is another than the initializer's, a tied one, where
            the initializer stays because something reads it in full.
    """

    name: str
    products: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]
    piece: Quantized

    @property
    def replaces_weight(self) -> bool:
        """Whether nothing reads the weight in full any more."""
        return self.piece.name == self.name


def choose_weights(
    model: ir.Model,
    names: Mapping[str, Sequence[str]],
    sources: Mapping[str, SourceTensor],
    config: QuantizeConfig,
    dtype: str,
) -> list[WeightChoice]:
    """Return which of a model's weights to quantise: the matrices that tokens meet.

    Args:
        model: the graph.
        names: initializer name → every name the model has for this weight.
        sources: the tensors to quantise, by initializer name.
        config: what the user asked for.
        dtype: element type of activations and scales.
    """
    vocab_size = int(model.graph.outputs[0].shape[2])  # type: ignore[index, arg-type]
    width = _width(model, vocab_size)
    choices = []
    for name, aliases in names.items():
        value = model.graph.initializers[name]
        if value.shape is None or len(value.shape) != 2:
            continue
        products = tuple(use.node for use in value.uses() if is_product(*use))
        lookups = tuple(use.node for use in value.uses() if is_lookup(*use))
        others = len(value.uses()) - len(products) - len(lookups)
        rows, columns = value.shape.numpy()
        is_head = bool(products) and rows == vocab_size
        module = name.removesuffix(".weight")
        kind = config.lm_head_kind if is_head else None
        if not products:
            kind = config.table_kind(tied=False)
        elif not is_head:
            kind = config.projection_kind(module, rows, columns, width)
        # The choice of experts depends on small differences, and routers are small.
        if kind is None or is_router_weight(name):
            continue
        if config.form == "qdq" and kind == "int4" and columns % 2:
            continue  # two share a byte, and rows begin with one
        taken = lookups if config.table_kind(tied=bool(products)) else ()
        stays = others > 0 or taken != lookups
        spare = [alias for alias in aliases if alias != name] if stays else [name]
        if spare and (products or taken):
            piece = _piece(spare[0], sources[name], kind, config, dtype)
            choices.append(WeightChoice(name, products, taken, piece))
    return choices


def _width(model: ir.Model, vocab_size: int) -> int:
    """Return the features of a token: the columns of the narrowest table of the vocabulary."""
    shapes = [value.shape for value in model.graph.initializers.values() if value.shape is not None]
    widths = [int(s[1]) for s in shapes if len(s) == 2 and s[0] == vocab_size]  # type: ignore
    return min(widths, default=NARROW)


def _piece(
    name: str, tensor: SourceTensor, kind: str, config: QuantizeConfig, dtype: str
) -> Quantized:
    """Describe how a weight is stored: as blocks, or with one scale a row where engines want it."""
    own = kept_type(tensor) if config.source_blocks == "keep" else None
    if own is not None and (config.form != "qdq" or _suits_engines(own, kind, config, dtype)):
        return kept_piece(name, tensor, own, dtype, signed=config.form == "qdq")
    if config.form == "qdq" and kind != "int4":
        return ChannelWeight(name, tensor, kind, dtype)
    rows, columns = tensor.shape
    symmetric = config.is_symmetric(kind)
    size = config.block_size_of(kind)
    form = BlockFormat(rows, columns, BITS[kind], size, symmetric)
    method = config.scales if config.weights == "int4" else "range"
    halves = method == "search" and config.form != "qdq" and fits_half(tensor, form)
    scales = "float16" if halves else dtype
    return QuantizedWeight(name, tensor, form, scales, config.form == "qdq", method)


def _suits_engines(own: KeptType, kind: str, config: QuantizeConfig, dtype: str) -> bool:
    """Say whether blocks are INT4 as engines take it, with the scales that they have."""
    same = own.bits == BITS[kind] == 4 and own.block_size == config.block_size_of(kind)
    return same and not own.offsets and dtype in (own.scales, "float32")


def check_chosen(
    model: ir.Model, choices: Iterable[WeightChoice], check: Callable[[object, str], None]
) -> None:
    """Check that the graph reads the chosen weights as they were chosen, and still in full."""
    for choice in choices:
        value = model.graph.initializers.get(choice.name)
        check(value is not None, f"the graph has no initializer {choice.name}")
        assert value is not None
        same = value.shape == ir.Shape(choice.piece.tensor.shape)
        check(same, f"{choice.name} has shape {value.shape}, not {choice.piece.tensor.shape}")
        readers = {use.node for use in value.uses() if is_product(*use) or is_lookup(*use)}
        strangers = {*choice.products, *choice.lookups} - readers
        check(not strangers, f"{len(strangers)} nodes do not read {choice.name} in full")


def check_replaced(
    model: ir.Model, choices: Iterable[WeightChoice], check: Callable[[object, str], None]
) -> None:
    """Check that no chosen reader reads a weight in full, and that unread weights are gone."""
    for choice in choices:
        value = model.graph.initializers.get(choice.name)
        gone = value is None
        check(gone is choice.replaces_weight, f"{choice.name} is in the graph: {not gone}")
        readers = {use.node for use in value.uses()} if value is not None else set()
        left = readers & {*choice.products, *choice.lookups}
        check(not left, f"{len(left)} nodes read {choice.name} in full")


def is_product(node: ir.Node, place: int) -> bool:
    """Say whether a node multiplies by what it reads at a place, as LinearToGemmPass leaves it."""
    return is_op(node, "Gemm") and place == 1 and node.attributes.get_int("transB", 0) == 1


def is_lookup(node: ir.Node, place: int) -> bool:
    """Say whether a node looks rows up in what it reads at a place."""
    return is_op(node, "Gather") and place == 0
