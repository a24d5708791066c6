"""What looks like attention over the last tokens and is not is refused by measuring it alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from lminf_export.errors import ModelError
from lminf_export.rewriting.run import rewrite
from tests.support.foreign_attention import group_query, multi_head, packed_weights, standard
from tests.support.foreign_decoders import MICROSOFT, Attend, Graph, Spec, decoder
from tests.support.foreign_plain import Plain

PLAIN = Spec()
TWO = replace(PLAIN, layers=2)
ALL_HEADS = Spec(kv_heads=4)
UNTURNED = replace(PLAIN, rotary_dim=0)


@dataclass(frozen=True)
class Shared(Plain):
    """Layers that take the keys and values of the first."""

    kept: dict[str, str] = field(default_factory=dict, compare=False)

    def _cached(self, graph: Graph, layer: int, kind: str, new: str) -> str:
        if layer == 0:
            self.kept[kind] = super()._cached(graph, layer, kind, new)
        return self.kept[kind]


class Cross(Plain):
    """Attention over what is in the cache and no new token."""

    def _cached(self, graph: Graph, layer: int, kind: str, new: str) -> str:
        return graph.past(layer, kind)


class ReadKeys(Plain):
    """Attention whose cached keys are added to its result."""

    def __call__(self, graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        found = super().__call__(graph, query, key, value, layer)
        keys = next(n.input[0] for n in graph.nodes if "present.0.key" in n.output)
        mean = graph.ReduceMean(keys, graph.ints(2, 3), keepdims=0)
        return str(graph.Add(found, graph.ReduceMean(mean, graph.ints(0, 1))))


class Doubled(Plain):
    """Attention whose weights sum to two."""

    def _softmax(self, graph: Graph, scores: str, layer: int) -> str:
        return str(graph.Mul(super()._softmax(graph, scores, layer), graph.array(2.0)))


class Sigmoid(Plain):
    """Attention without a sum over keys."""

    def _softmax(self, graph: Graph, scores: str, layer: int) -> str:
        return str(graph.Sigmoid(scores))


class NarrowValues(Plain):
    """Values of half as many dimensions as keys, in a cache of their own shape."""

    def __call__(self, graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        spec = graph.spec
        narrow = graph.Split(graph.heads(value, spec.kv_heads), axis=3, num_outputs=2, outputs=2)[0]
        shape = ["B", spec.kv_heads, "P", spec.dim // 2]
        old = graph.input(f"past_key_values.{layer}.value", graph.element, shape)
        values = graph.Concat(old, narrow, axis=2)
        graph.output(f"present.{layer}.value", values, graph.element, None)
        query = graph.heads(query, spec.heads)
        keys = self._cached(graph, layer, "key", graph.heads(key, spec.kv_heads))
        scores, _ = self._scores(graph, query, keys, keys)
        weights = self._softmax(graph, self._masked(graph, scores, query), layer)
        wide = graph.Concat(values, values, axis=3)
        return graph.flat(graph.MatMul(weights, self._repeated(graph, wide)))


def masked_decode(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
    """com.microsoft::DecoderMaskedMultiHeadAttention, for one new token."""
    output, *present = graph.DecoderMaskedMultiHeadAttention(
        *(query, key, value, "", ""),
        *(graph.past(layer, "key"), graph.past(layer, "value")),
        outputs=3,
        domain=MICROSOFT,
        num_heads=graph.spec.heads,
    )
    for kind, tensor in zip(("key", "value"), present, strict=True):
        graph.present(layer, kind, tensor)
    return str(output)


def first_layer_of(attend: Attend) -> Attend:
    """Attention over the first layer's cache in every layer."""

    def first(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
        return attend(graph, query, key, value, 0)

    return first


def integers(graph: Graph, query: str, key: str, value: str, layer: int) -> str:
    """GroupQueryAttention over caches of int8."""
    for kind in ("key", "value"):
        shape = ["B", graph.spec.kv_heads, "P", graph.spec.dim]
        graph.input(f"past_key_values.{layer}.{kind}", onnx.TensorProto.INT8, shape)
    return group_query(kv_cache_bit_width=8)(graph, query, key, value, layer)


NOT_A_WINDOW = "has a mask that is no window"
LATER = "sees later tokens"
LOOKALIKES: dict[str, tuple[Spec, Attend, str]] = {
    "not-causal-group-query": (PLAIN, group_query(causal=0), LATER),
    "not-causal-multi-head": (ALL_HEADS, multi_head(mask="everything"), LATER),
    "not-causal-standard": (PLAIN, standard(mask="everything"), LATER),
    "not-causal-plain": (PLAIN, Plain(mask="all"), LATER),
    "prefix": (PLAIN, Plain(mask="prefix"), LATER),
    "chunks": (PLAIN, Plain(mask="chunks"), NOT_A_WINDOW),
    "chunks-of-half": (PLAIN, Plain(mask="chunks-of-64"), NOT_A_WINDOW),
    "dilated": (PLAIN, Plain(mask="dilated"), NOT_A_WINDOW),
    "holes": (PLAIN, Plain(mask="holes"), NOT_A_WINDOW),
    "starting-tokens": (PLAIN, Plain(mask="starts"), NOT_A_WINDOW),
    "window-of-one-head": (PLAIN, Plain(mask="one-head"), NOT_A_WINDOW),
    "window-of-decoding": (PLAIN, Plain(mask="decode-only"), "is not understood"),
    "cached-before-rotation": (PLAIN, Plain(wrong="cached-before-rotation"), "is not understood"),
    "two-bases": (PLAIN, Plain(wrong="two-bases"), "weighs the same product otherwise"),
    "temperature": (PLAIN, Plain(wrong="temperature"), "temperature by position"),
    "norm-of-rotated": (PLAIN, Plain(wrong="norm-of-rotated"), "(in no known way|understood)"),
    "bias-by-features": (PLAIN, Plain(mask="features"), "depends on tokens besides"),
    "doubled": (PLAIN, Doubled(), "(sees|mask|understood|known way)"),
    "sigmoid": (PLAIN, Sigmoid(), "attends nowhere"),
    "narrow-values": (UNTURNED, NarrowValues(), "expected values of as many dimensions as keys"),
    "shared-keys": (TWO, Shared(), "read by several attentions"),
    "one-cache": (TWO, first_layer_of(Plain()), "read by several attentions"),
    "one-cache-of-nodes": (TWO, first_layer_of(group_query()), "read by several attentions"),
    "read-keys": (PLAIN, ReadKeys(), "still reads"),
    "read-keys-not-rotated": (UNTURNED, ReadKeys(), "still reads"),
    "cross": (PLAIN, Cross(), "(meets no keys of new tokens|not made of the tokens' features)"),
    "integers": (PLAIN, integers, "quantised"),
    "bits": (PLAIN, group_query(kv_cache_bit_width=8), "quantised cache"),
    "kinds": (PLAIN, group_query(k_quant_type="PER_TENSOR"), "quantised cache"),
    "one-token-only": (ALL_HEADS, masked_decode, "MultiHeadAttention.* is not understood"),
    "rotates-itself": (ALL_HEADS, packed_weights(), "export the model with GroupQueryAttention"),
    "no-cache": (replace(ALL_HEADS, rotary_dim=0), packed_weights(past=False), "with a cache"),
}


def require_refused(folder: Path, graph: Graph, message: str) -> None:
    onnx.save(graph.model(), folder / "model.onnx")
    with pytest.raises(ModelError, match=message) as caught:
        rewrite(folder / "model.onnx", folder / "out", window_size=23, chunk_size=7, check=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (folder / "out").exists()


@pytest.mark.parametrize("form", LOOKALIKES)
def test_lookalike_is_refused(tmp_path: Path, form: str) -> None:
    spec, attend, message = LOOKALIKES[form]
    graph = Graph(spec)
    decoder(graph, attend)
    require_refused(tmp_path, graph, message)


@pytest.mark.parametrize("attend", [Plain(), group_query()], ids=["plain", "group-query"])
def test_learned_positions_are_refused(tmp_path: Path, attend: Attend) -> None:
    def placed(graph: Graph, normed: str) -> str:
        table = np.random.default_rng(5).standard_normal((128, 24))
        return str(graph.Add(normed, graph.Gather(graph.array(table), graph.positions())))

    graph = Graph(UNTURNED)
    decoder(graph, attend, normed_of=placed)
    require_refused(tmp_path, graph, "adds embeddings of positions")


def test_opset_beyond_the_known_is_refused(tmp_path: Path) -> None:
    graph = Graph(PLAIN, opset=26)
    decoder(graph, Plain())
    require_refused(tmp_path, graph, "newer than 24")
