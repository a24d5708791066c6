"""Counts the parameters of a bundle's model, whatever form its weights are stored in."""

from __future__ import annotations

import json
from typing import Any

import onnx_ir as ir

from lminf_export.bench.graph import read_graph
from lminf_export.bundle.folder import Bundle
from lminf_export.quantize.names import OFFSETS, QUANTIZED, SCALES, ZERO_POINTS

# Operators that take weights in integers.
_INTEGERS = ("GatherBlockQuantized", "DequantizeLinear")
_BLOCKS = ("MatMulNBits", "LinearNBits", "LinearNBitsAdd")
_LOOKUPS = ("Gather", "GatherBlockQuantized")
# Names of what belongs to weights in integers and is none itself.
_BESIDE = (SCALES, ZERO_POINTS, OFFSETS)
# Names of the width of a model's embedding in config.json.
_WIDTHS = ("hidden_size", "n_embd", "d_model")


def count_parameters(bundle: Bundle) -> int:
    """Return the number of a model's parameters; tied ones count once, scales do not."""
    seen: set[tuple[str, int]] = set()
    tables: list[int] = []
    others: list[int] = []
    quantization = bundle.manifest.quantization
    blocks = {} if quantization is None else quantization.tensors
    config = _config(bundle)
    for name, value in read_graph(bundle).initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or name.endswith(_BESIDE):
            continue  # tables and other constants of the graph, scales
        place = (str(tensor.location), tensor.offset or 0)
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


def _elements(value: ir.Value, tensor: ir.ExternalTensor, bits: int | None) -> int:
    """Return the number of parameters that a stored tensor holds.

    Args:
        value: the initializer.
        tensor: where its bytes are.
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
