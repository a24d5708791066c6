"""Every tensor that crosses the graph's border: name, element type, symbolic shape, order.

Exporter, builders and runtimes read this file and nothing else, so a name or a shape is
written once. Letters: B batch, S new tokens, K rows of logits asked for, V vocabulary,
G key/value heads, C ring slots, N sink tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
SCALE_DTYPE, SCALE_BYTES = "float32", 4

Dim = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its element type in ONNX's words, its shape.

    A dimension is an integer or the name of a symbol.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]


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

    def ring_slot_bytes(self, item_size: int, kv_cache_dtype: str | None = None) -> int:
        """Bytes of one token's key and value in the ring.

        Args:
            item_size: bytes of an element of the model's type.
            kv_cache_dtype: "int8", or None for a ring in the model's type.
        """
        row = self.head_dim * item_size
        if kv_cache_dtype is not None:
            row = self.head_dim + SCALE_BYTES
        return 2 * self.num_kv_heads * row

    def sink_bytes(self, item_size: int) -> int:
        """Bytes of one starting token's key and value, in the model's type."""
        return 2 * self.num_kv_heads * self.head_dim * item_size

    def cache_bytes(
        self, item_size: int, kv_cache_dtype: str | None = None, slots: int | None = None
    ) -> int:
        """Bytes of one sequence's caches in this layer, its ring full or of so many slots."""
        slots = self.ring_capacity if slots is None else slots
        ring = slots * self.ring_slot_bytes(item_size, kv_cache_dtype)
        return ring + self.num_sink_tokens * self.sink_bytes(item_size)


def past_name(layer: int, kind: str) -> str:
    """Name of a cache input; kind is one of RING_KINDS or SINK_KINDS."""
    return f"{PAST}{layer}.{kind}"


def present_name(layer: int, kind: str) -> str:
    """Name of the cache output that continues `past_name(layer, kind)`."""
    return f"{PRESENT}{layer}.{kind}"


def layer_cache_specs(
    layer: LayerSpec, dtype: str, kv_cache_dtype: str | None = None
) -> Iterator[TensorSpec]:
    """Yield one layer's caches, each under its kind alone, in graph order.

    Args:
        layer: which.
        dtype: the model's element type.
        kv_cache_dtype: "int8" for rings of int8, or None for rings in the model's type.
    """
    heads = (BATCH, layer.num_kv_heads)
    ring_dtype = dtype if kv_cache_dtype is None else kv_cache_dtype
    for kind in RING_KINDS:
        yield TensorSpec(kind, ring_dtype, (*heads, layer.ring_symbol, layer.head_dim))
    if layer.num_sink_tokens:
        for kind in SINK_KINDS:
            yield TensorSpec(kind, dtype, (*heads, layer.num_sink_tokens, layer.head_dim))
    if kv_cache_dtype is not None:
        for kind in SCALE_KINDS:
            yield TensorSpec(kind, SCALE_DTYPE, (*heads, layer.ring_symbol, 1))


def cache_specs(
    layers: Sequence[LayerSpec], dtype: str, kv_cache_dtype: str | None = None, *, present: bool
) -> Iterator[TensorSpec]:
    """Yield the cache tensors of all layers, in graph order: see `layer_cache_specs`."""
    name = present_name if present else past_name
    for index, layer in enumerate(layers):
        for spec in layer_cache_specs(layer, dtype, kv_cache_dtype):
            yield TensorSpec(name(index, spec.name), spec.dtype, spec.shape)


def input_specs(
    layers: Sequence[LayerSpec], dtype: str, kv_cache_dtype: str | None = None
) -> list[TensorSpec]:
    """Return the graph's inputs in order.

    input_ids (B, S) holds token ids, rows shorter than S padded at the end with any valid
    id; past_length (B) the tokens each row has seen before; new_length (B) the real tokens
    each row brings, 0 … S; logits_index (B, K) which of the S rows get logits.
    """
    return [
        TensorSpec(INPUT_IDS, "int64", (BATCH, SEQUENCE)),
        TensorSpec(PAST_LENGTH, "int64", (BATCH,)),
        TensorSpec(NEW_LENGTH, "int64", (BATCH,)),
        TensorSpec(LOGITS_INDEX, "int64", (BATCH, NUM_LOGITS)),
        *cache_specs(layers, dtype, kv_cache_dtype, present=False),
    ]


def output_specs(
    layers: Sequence[LayerSpec], dtype: str, vocab_size: int, kv_cache_dtype: str | None = None
) -> list[TensorSpec]:
    """Return the graph's outputs in order; logits are float32 whatever the model's type."""
    return [
        TensorSpec(LOGITS, "float32", (BATCH, NUM_LOGITS, vocab_size)),
        *cache_specs(layers, dtype, kv_cache_dtype, present=True),
    ]
