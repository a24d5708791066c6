"""The graph's inputs and outputs, and everything that follows from the kind of cache.

`GraphContract` answers which tensors a layer keeps, their element types and their bytes. A new
kind of cache is described here; docs/howto/add_a_kind_of_cache.md names the other files it needs.
Imports neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lminf_export.operator.bindings import (
    BATCH,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDEX,
    NEW_LENGTH,
    NUM_LOGITS,
    PAST_LENGTH,
    RING_KINDS,
    SCALE_KINDS,
    SEQUENCE,
    SINK_KINDS,
    Dim,
    LayerSpec,
    TensorSpec,
    past_name,
    present_name,
)
from lminf_export.operator.settings import Dtype, KvCacheDtype
from lminf_export.tensors.dtypes import item_size


@dataclass(frozen=True)
class GraphContract:
    """Everything that determines a graph's inputs and outputs.

    Attributes:
        layers: the caches of the layers, in order.
        dtype: the model's element type.
        kv_cache_dtype: "int8" for rings of int8, or None for rings in the model's type.
        vocab_size: V.
    """

    layers: tuple[LayerSpec, ...]
    dtype: Dtype
    kv_cache_dtype: KvCacheDtype | None
    vocab_size: int

    @property
    def int8_cache(self) -> bool:
        """Whether rings hold int8 with a scale for each token and key/value head."""
        return self.kv_cache_dtype == "int8"

    @property
    def ring_capacities(self) -> tuple[int, ...]:
        """Full capacities C of the rings, each once, ascending."""
        return tuple(sorted({layer.ring_capacity for layer in self.layers}))

    def inputs(self) -> list[TensorSpec]:
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
            *self.caches(present=False),
        ]

    def outputs(self) -> list[TensorSpec]:
        """Return the graph's outputs in order; logits are float32 whatever the model's type."""
        logits = TensorSpec(LOGITS, "float32", (BATCH, NUM_LOGITS, self.vocab_size))
        return [logits, *self.caches(present=True)]

    def caches(self, *, present: bool = False) -> Iterator[TensorSpec]:
        """Yield the cache tensors of all layers in graph order: inputs, or outputs if present."""
        name = present_name if present else past_name
        for index, layer in enumerate(self.layers):
            for spec in self.layer_caches(layer):
                yield TensorSpec(name(index, spec.name), spec.dtype, spec.shape)

    def layer_caches(self, layer: LayerSpec) -> list[TensorSpec]:
        """Return one layer's caches, each under its kind alone, in graph order."""
        return [
            TensorSpec(kind, dtype, (BATCH, layer.num_kv_heads, tokens, row))
            for kind, dtype, tokens, row in self._cache_rows(layer)
        ]

    def ring_sizes(self, slots: Mapping[int, int] | None = None) -> dict[str, int]:
        """Return the size of every symbolic ring dimension.

        Args:
            slots: full capacity → slots of the rings of that capacity; by default all are full.
        """
        full = {layer.ring_symbol: layer.ring_capacity for layer in self.layers}
        return full if slots is None else {name: slots[size] for name, size in full.items()}

    def ring_updates(self) -> dict[str, str]:
        """Return past name → present name of every ring tensor, scales included."""
        return self._updates(in_ring=True)

    def sink_updates(self) -> dict[str, str]:
        """Return past name → present name of every tensor of starting tokens."""
        return self._updates(in_ring=False)

    def layer_bytes(self, layer: LayerSpec, slots: int, sinks: int) -> int:
        """Return the bytes of one sequence's tokens in a layer's caches.

        Args:
            layer: which.
            slots: tokens in the ring.
            sinks: starting tokens kept beside it.
        """
        return layer.num_kv_heads * sum(
            (slots if tokens == layer.ring_symbol else sinks) * row * item_size(dtype)
            for _, dtype, tokens, row in self._cache_rows(layer)
        )

    def cache_bytes(self, slots: Mapping[int, int] | None = None) -> int:
        """Return the bytes of one sequence's caches; `slots` as for `ring_sizes`."""
        sizes = self.ring_sizes(slots)
        return sum(
            self.layer_bytes(layer, sizes[layer.ring_symbol], layer.num_sink_tokens)
            for layer in self.layers
        )

    def _updates(self, *, in_ring: bool) -> dict[str, str]:
        return {
            past_name(index, kind): present_name(index, kind)
            for index, layer in enumerate(self.layers)
            for kind, _, tokens, _ in self._cache_rows(layer)
            if (tokens == layer.ring_symbol) == in_ring
        }

    def _cache_rows(self, layer: LayerSpec) -> Iterator[tuple[str, str, Dim, int]]:
        """Yield kind, element type, tokens and elements of a row of each cache, in graph order."""
        for kind in RING_KINDS:
            yield kind, self.kv_cache_dtype or self.dtype, layer.ring_symbol, layer.head_dim
        if layer.num_sink_tokens:
            for kind in SINK_KINDS:
                yield kind, self.dtype, layer.num_sink_tokens, layer.head_dim
        if self.int8_cache:
            for kind in SCALE_KINDS:
                yield kind, "float32", layer.ring_symbol, 1
