"""Names and symbolic dimensions of the graph's inputs and outputs, and a layer's cache sizes.

Exporter, builders and runtimes take names from here, and tensors from
`graph_contract.GraphContract`. Letters: B batch, S new tokens, K rows of logits, V vocabulary,
G key/value heads, C ring slots, N sink tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lminf_export.tensors.dtypes import item_size

BATCH = "batch"
SEQUENCE = "sequence"
NUM_LOGITS = "num_logits"

INPUT_IDS = "input_ids"
PAST_LENGTH = "past_length"
NEW_LENGTH = "new_length"
LOGITS_INDEX = "logits_index"
LOGITS = "logits"

PAST, PRESENT = "past_key_values.", "present."

RING_KINDS = ("key", "value")
SINK_KINDS = ("sink_key", "sink_value")
# Of a ring of int8: one float32 for each token and key/value head.
SCALE_KINDS = ("key_scale", "value_scale")

Dim = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its element type in ONNX's words, its shape.

    A dimension is an integer or the name of a symbol.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with a size for every symbol."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes of a cache tensor, with a size for every symbol."""
        return prod(self.sized(sizes)) * item_size(self.dtype)


@dataclass(frozen=True)
class LayerSpec:
    """The cache of one layer.

    Attributes:
        num_kv_heads: G.
        head_dim: D.
        window_size: W of this layer, the query's own key included.
        num_sink_tokens: N of this layer; 0 means the layer has no sink tensors.
        distance_limit: L of this layer.
        ring_capacity: C, slots of the full ring.
    """

    num_kv_heads: int
    head_dim: int
    window_size: int
    num_sink_tokens: int
    distance_limit: int
    ring_capacity: int

    @property
    def ring_symbol(self) -> str:
        """Name of the ring's symbolic dimension; layers with equal rings share it."""
        return f"ring_{self.ring_capacity}"


def past_name(layer: int, kind: str) -> str:
    """Name of a cache input; kind is one of RING_KINDS or SINK_KINDS."""
    return f"{PAST}{layer}.{kind}"


def present_name(layer: int, kind: str) -> str:
    """Name of the cache output that continues `past_name(layer, kind)`."""
    return f"{PRESENT}{layer}.{kind}"
