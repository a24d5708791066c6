"""Counts the parameters of a bundle's model, whatever form its weights are stored in."""

from __future__ import annotations

import json
from typing import Any

import onnx_ir as ir

from lminf_export.bench.graph import Place, read_graph, stored_weights
from lminf_export.bundle.folder import Bundle
from lminf_export.quantize.names import OFFSETS, QUANTIZED, SCALES, ZERO_POINTS

# Operators that take weights in integers.
_INTEGERS = ("GatherBlockQuantized", "DequantizeLinear")
_BLOCKS = ("MatMulNBits", "LinearNBits", "LinearNBitsAdd")
_LOOKUPS = ("Gather", "GatherBlockQuantized")
# What belongs to weights in integers and is none itself: names of exports, and inputs of operators.
_BESIDE = (SCALES, ZERO_POINTS, OFFSETS)
_BESIDE_INPUTS = {
    "MatMulNBits": (2, 3, 4),
    "LinearNBits": (2, 3),
    "LinearNBitsAdd": (2, 4),
    "GatherBlockQuantized": (2, 3),
    "DequantizeLinear": (1, 2),
    "MatMulInteger": (2, 3),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "QMoE": (3, 6, 9, 11, 12, 13),
}
# Names of the width of a model's embedding in config.json.
_WIDTHS = ("hidden_size", "n_embd", "d_model")


def count_parameters(bundle: Bundle) -> int:
    """Return the number of a model's parameters; tied ones count once, scales do not."""
    seen: set[Place] = set()
    tables: list[int] = []
    others: list[int] = []
    quantization = bundle.manifest.quantization
    blocks = {} if quantization is None else quantization.tensors
    config = _config(bundle)
    for value, tensor, place in stored_weights(bundle, read_graph(bundle)):
        name = str(value.name)
        if name.endswith(_BESIDE) or any(_is_beside(node, index) for node, index in value.uses()):
            continue
        if place not in seen:
            seen.add(place)
            is_table = all(node.op_type in _LOOKUPS for node, _ in value.uses())
            own = blocks.get(name.partition(QUANTIZED)[0]) if QUANTIZED in name else None
            size = _elements(value, tensor, None if own is None else own.bits)
            if is_table and own is not None:
                size = _unpadded(size, tensor.shape.numpy()[0], own.block_size, config)
            (tables if is_table else others).append(size)
    if config and config.get("tie_word_embeddings", True):
        # A tied table is there a second time where the head is stored in another form.
        tables = [size for size in tables if size not in others]
    return sum(tables) + sum(others)


def _is_beside(node: ir.Node, index: int) -> bool:
    """Say whether an operator takes scales, zero points or an order at an input."""
    return index in _BESIDE_INPUTS.get(node.op_type, ())


def _config(bundle: Bundle) -> dict[str, Any]:
    """Return the content of config.json; nothing where there is none."""
    try:
        config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _unpadded(size: int, rows: int, block_size: int, config: dict[str, Any]) -> int:
    """Return the elements of a table without what fills up the last block of each row."""
    width = next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), None)
    if width is not None and 0 <= size // rows - width < block_size:
        return rows * int(width)
    return size


def _elements(value: ir.Value, tensor: ir.TensorProtocol, bits: int | None) -> int:
    """Return the number of parameters that a stored tensor holds.

    Args:
        value: the initializer.
        tensor: what is stored.
        bits: of an integer, where the manifest says it; in use where several share a byte.
    """
    for node, _ in value.uses():
        if node.op_type in _BLOCKS:  # packed in blocks, the last one padded
            return node.attributes["K"].as_int() * node.attributes["N"].as_int()
        if node.op_type in _INTEGERS and "bits" in node.attributes:
            bits = node.attributes["bits"].as_int()
    if bits is None or value.dtype != ir.DataType.UINT8:
        return tensor.size
    return tensor.size * 8 // bits
