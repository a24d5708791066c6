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

RING_KINDS = ("key", "value")
SINK_KINDS = ("sink_key", "sink_value")

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

    @property
    def cache_elements(self) -> int:
        """Elements one sequence needs in this layer when its ring is full."""
        slots = self.ring_capacity + self.num_sink_tokens
        return 2 * self.num_kv_heads * slots * self.head_dim


def past_name(layer: int, kind: str) -> str:
    """Name of a cache input; kind is one of RING_KINDS or SINK_KINDS."""
    return f"past_key_values.{layer}.{kind}"


def present_name(layer: int, kind: str) -> str:
    """Name of the cache output that continues `past_name(layer, kind)`."""
    return f"present.{layer}.{kind}"


def cache_specs(layers: Sequence[LayerSpec], dtype: str, *, present: bool) -> Iterator[TensorSpec]:
    """Yield the cache tensors of all layers, in graph order."""
    name = present_name if present else past_name
    for index, layer in enumerate(layers):
        for kind in RING_KINDS:
            shape = (BATCH, layer.num_kv_heads, layer.ring_symbol, layer.head_dim)
            yield TensorSpec(name(index, kind), dtype, shape)
        if layer.num_sink_tokens:
            for kind in SINK_KINDS:
                yield TensorSpec(
                    name(index, kind),
                    dtype,
                    (BATCH, layer.num_kv_heads, layer.num_sink_tokens, layer.head_dim),
                )


def input_specs(layers: Sequence[LayerSpec], dtype: str) -> list[TensorSpec]:
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
        *cache_specs(layers, dtype, present=False),
    ]


def output_specs(layers: Sequence[LayerSpec], dtype: str, vocab_size: int) -> list[TensorSpec]:
    """Return the graph's outputs in order; logits are float32 whatever the model's type."""
    return [
        TensorSpec(LOGITS, "float32", (BATCH, NUM_LOGITS, vocab_size)),
        *cache_specs(layers, dtype, present=True),
    ]
