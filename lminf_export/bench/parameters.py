"""Counts the parameters of a bundle's model, whatever form its weights are stored in."""

from __future__ import annotations

import json

import onnx_ir as ir

from lminf_export.bench.graph import read_graph
from lminf_export.bundle.folder import Bundle

# Operators that take weights in integers, and their inputs that are scales and zero points.
_INTEGERS = {"GatherBlockQuantized": (2, 3), "DequantizeLinear": (1, 2)}
_BLOCKS = ("MatMulNBits", "LinearNBits", "LinearNBitsAdd")
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_SCALES = {**_INTEGERS, **dict.fromkeys(_BLOCKS, (2, 3))}


def count_parameters(bundle: Bundle) -> int:
    """Return the number of a model's parameters; tied ones count once, scales do not."""
    seen: set[tuple[str, int]] = set()
    tables: list[int] = []
    others: list[int] = []
    for value in read_graph(bundle).initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue  # tables and other constants of the graph
        place = (str(tensor.location), tensor.offset or 0)
        if place not in seen:
            seen.add(place)
            is_table = all(node.op_type in _LOOKUPS for node, _ in value.uses())
            (tables if is_table else others).append(_elements(value, tensor))
    if _ties_embeddings(bundle):
        # A tied table is there a second time where the head is stored in another form.
        tables = [size for size in tables if size not in others]
    return sum(tables) + sum(others)


def _ties_embeddings(bundle: Bundle) -> bool:
    try:
        config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("tie_word_embeddings", True))


def _elements(value: ir.Value, tensor: ir.ExternalTensor) -> int:
    """Return the number of parameters that a stored tensor holds."""
    uses = [(node, index) for node, index in value.uses()]
    if uses and all(index in _SCALES.get(node.op_type, ()) for node, index in uses):
        return 0
    for node, _ in uses:
        if node.op_type in _BLOCKS:  # packed in blocks, the last one padded
            return node.attributes["K"].as_int() * node.attributes["N"].as_int()
        if node.op_type in _INTEGERS and value.dtype == ir.DataType.UINT8:
            bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 8
            return tensor.size * 8 // bits
    return tensor.size
