"""A bundle made by hand: random weights, a few LambdaAttention nodes, a byte tokenizer.

The runtime's tests need a graph of the contract, not a model of any family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest, new_manifest
from lminf_export.bundle.records import Engine, SourceRecord
from lminf_export.bundle.writer import BundleWriter
from lminf_export.operator import bindings, contract
from lminf_export.operator.attention_body import OPSET, BodyFeatures, function_body
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import LambdaConfig, ring_capacity
from lminf_export.tensors.dtypes import ELEMENT_TYPES


@dataclass(frozen=True)
class TinyModel:
    """Sizes of a hand-made model; the last layer may be a sliding-window one."""

    window_size: int = 13
    num_sink_tokens: int = 3
    chunk_size: int = 7
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 6
    vocab_size: int = 257
    sliding_window: int | None = None
    dtype: str = "float32"
    kv_cache_dtype: str | None = None
    nan_token: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logits_scale: float = 1.0

    @property
    def settings(self) -> LambdaConfig:
        return LambdaConfig(
            window_size=self.window_size,
            num_sink_tokens=self.num_sink_tokens,
            chunk_size=self.chunk_size,
        )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        full = self._layer(self.window_size, self.num_sink_tokens)
        last = full if self.sliding_window is None else self._layer(self.sliding_window, 0)
        return (full,) * (self.num_layers - 1) + (last,)

    @property
    def contract(self) -> GraphContract:
        return GraphContract(self.layers, self.dtype, self.kv_cache_dtype, self.vocab_size)

    def _layer(self, window: int, sinks: int) -> LayerSpec:
        capacity = ring_capacity(window, self.chunk_size)
        return LayerSpec(self.num_kv_heads, self.head_dim, window, sinks, window, capacity)

    def manifest(self, engine: Engine | None = None) -> Manifest:
        kinds = ["lambda"] * self.num_layers
        if self.sliding_window is not None:
            kinds[-1] = "sliding"
        return new_manifest(
            model_type="llama",
            source=SourceRecord(name="somebody/tiny", revision="main"),
            settings=self.settings,
            contract=self.contract,
            num_attention_heads=self.num_heads,
            training_length=self.window_size,
            layer_kinds=kinds,
            eos_token_ids=self.eos_token_ids,
            tools={"onnx": onnx.__version__},
            notices=["a model made by hand"],
            engine=engine,
        )

    def write(self, directory: Path, *, force: bool = False, tokenizer: bool = True) -> Bundle:
        """Write the bundle."""
        with BundleWriter(directory, force=force) as writer:
            graph = writer.add("model.onnx", "graph")
            writer.add("model.onnx.data", "weights")
            onnx.save(
                self.graph,
                graph,
                save_as_external_data=True,
                location="model.onnx.data",
                size_threshold=256,
            )
            if tokenizer:
                byte_tokenizer().save(str(writer.add("tokenizer.json", "tokenizer")))
            writer.commit(self.manifest())
        return Bundle.open(directory)

    @property
    def graph(self) -> onnx.ModelProto:
        """The model; inputs, outputs and names as `bindings` says."""
        builder = _Builder(self)
        return builder.model()

    @cached_property
    def _reference_session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of every cache that is not in place
        return ort.InferenceSession(
            self.graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def reference_logits(self, token_ids: np.ndarray) -> np.ndarray:
        """(T, V) of one stream (T,), token by token, full rings, past and present apart."""
        sizes = {**self.contract.ring_sizes(), bindings.BATCH: 1}
        caches = {
            spec.name: np.zeros(spec.sized(sizes), spec.dtype)
            for spec in self.contract.caches(present=False)
        }
        rows = []
        for position, token in enumerate(token_ids):
            feed = {
                bindings.INPUT_IDS: np.array([[token]]),
                bindings.PAST_LENGTH: np.array([position]),
                bindings.NEW_LENGTH: np.array([1]),
                bindings.LOGITS_INDEX: np.array([[0]]),
            }
            logits, *present = self._reference_session.run(None, feed | caches)
            caches = dict(zip(caches, present, strict=True))
            rows.append(logits[0, 0])
        return np.stack(rows)


class _Builder:
    """Puts the graph together node by node."""

    def __init__(self, tiny: TinyModel) -> None:
        self.tiny = tiny
        self.random = np.random.default_rng(tiny.seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        tiny = self.tiny
        width = tiny.num_heads * tiny.head_dim
        embedding = self.random.normal(size=(tiny.vocab_size, width))
        if tiny.nan_token is not None:
            embedding[tiny.nan_token] = np.nan
        hidden = self.add("Gather", self.weight(embedding), bindings.INPUT_IDS)
        shared = self.positions()
        for index, layer in enumerate(tiny.layers):
            hidden = self.add("Add", hidden, self.attention(index, layer, hidden, *shared))
        axis = self.constant([-1])
        rows = self.add("Unsqueeze", bindings.LOGITS_INDEX, axis)
        chosen = self.add("GatherND", hidden, rows, batch_dims=1)
        head = self.random.normal(size=(width, tiny.vocab_size)) * tiny.logits_scale
        head = self.weight(head)
        product = self.add("MatMul", chosen, head)
        self.nodes.append(
            helper.make_node("Cast", [product], [bindings.LOGITS], to=TensorProto.FLOAT)
        )
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [_info(s) for s in tiny.contract.inputs()],
            [_info(s) for s in tiny.contract.outputs()],
            self.initializers,
        )
        return helper.make_model(
            graph,
            functions=[function_body(BodyFeatures(int8_cache=tiny.contract.int8_cache))],
            opset_imports=[
                helper.make_opsetid("", OPSET),
                helper.make_opsetid(contract.DOMAIN, 1),
            ],
            ir_version=11,
        )

    def positions(self) -> tuple[str, str, str]:
        """query_position, cos and sin of the new tokens."""
        zero, one = self.constant(0), self.constant(1)
        count = self.add("Squeeze", self.add("Shape", bindings.INPUT_IDS, start=1, end=2))
        steps = self.add("Range", zero, count, one)
        column = self.add("Unsqueeze", bindings.PAST_LENGTH, self.constant([1]))
        position = self.add("Add", column, steps)
        real = self.add("Cast", position, to=TensorProto.FLOAT)
        pairs = np.arange(self.tiny.head_dim // 2)
        inv_freq = self.constant((1 / 100 ** (pairs / len(pairs))).astype(np.float32))
        angle = self.add("Mul", self.add("Unsqueeze", real, self.constant([2])), inv_freq)
        return position, self.add("Cos", angle), self.add("Sin", angle)

    def attention(
        self, index: int, layer: LayerSpec, hidden: str, position: str, cos: str, sin: str
    ) -> str:
        tiny = self.tiny
        query = self.heads(hidden, tiny.num_heads)
        key = self.heads(hidden, tiny.num_kv_heads)
        value = self.heads(hidden, tiny.num_kv_heads)
        ring = [bindings.past_name(index, kind) for kind in bindings.RING_KINDS]
        present = [bindings.present_name(index, kind) for kind in bindings.RING_KINDS]
        if layer.num_sink_tokens:
            sinks = [bindings.past_name(index, kind) for kind in bindings.SINK_KINDS]
            present += [bindings.present_name(index, kind) for kind in bindings.SINK_KINDS]
        else:
            nothing = np.zeros((1, layer.num_kv_heads, 1, layer.head_dim))
            sinks = [self.weight(nothing), self.weight(nothing)]
            present += [f"no_sink_key_{index}", f"no_sink_value_{index}"]
        int8 = tiny.contract.int8_cache
        scale_kinds = bindings.SCALE_KINDS if int8 else ()
        scales = [bindings.past_name(index, kind) for kind in scale_kinds]
        present += [bindings.present_name(index, kind) for kind in scale_kinds]
        limit = np.zeros(layer.head_dim // 2, np.float32)
        output = f"attention_{index}"
        self.nodes.append(
            helper.make_node(
                contract.op_type(int8_cache=int8),
                [query, key, value, *ring, *sinks, bindings.PAST_LENGTH, bindings.NEW_LENGTH]
                + [position, self.slots(ring[0]), cos, sin]
                + [self.constant(limit + 0.5), self.constant(limit + 0.8)]
                + [self.constant(np.full(tiny.num_heads, x, np.float32)) for x in (0, -np.inf)]
                + scales,
                [output, *present],
                domain=contract.DOMAIN,
                plugin_namespace=contract.DOMAIN,
                num_sink_tokens=layer.num_sink_tokens,
                window_size=layer.window_size,
                distance_limit=layer.distance_limit,
                scale=tiny.head_dim**-0.5,
                softcap=0.0,
                rotary_dim=tiny.head_dim,
                rotary_interleaved=0,
            )
        )
        joined = self.add("Transpose", output, perm=[0, 2, 1, 3])
        flat = self.add("Reshape", joined, self.constant([0, 0, -1]))
        width = tiny.num_heads * tiny.head_dim
        return self.add("MatMul", flat, self.weight(self.random.normal(size=(width, width)) / 5))

    def slots(self, ring: str) -> str:
        """Positions (B, C) of a ring's slots, as `reference.slot_positions`."""
        capacity = self.add("Squeeze", self.add("Shape", ring, start=2, end=3))
        total = self.add("Add", bindings.PAST_LENGTH, bindings.NEW_LENGTH)
        last = self.add("Sub", total, self.constant(1))
        column = self.add("Unsqueeze", last, self.constant([1]))
        slot = self.add("Range", self.constant(0), capacity, self.constant(1))
        age = self.add("Mod", self.add("Sub", column, slot), capacity)
        return self.add("Sub", column, age)

    def heads(self, hidden: str, count: int) -> str:
        width, dim = self.tiny.num_heads * self.tiny.head_dim, self.tiny.head_dim
        matrix = self.weight(self.random.normal(size=(width, count * dim)) / 3)
        product = self.add("MatMul", hidden, matrix)
        split = self.add("Reshape", product, self.constant([0, 0, count, dim]))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def weight(self, array: np.ndarray) -> str:
        return self.constant(_tensor_of(array, self.tiny.dtype))

    def constant(self, value: object) -> str:
        name = f"constant_{len(self.initializers)}"
        if isinstance(value, onnx.TensorProto):
            value.name = name
            self.initializers.append(value)
        else:
            self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _tensor_of(array: np.ndarray, dtype: str) -> onnx.TensorProto:
    if dtype == "bfloat16":
        return numpy_helper.from_array(array.astype(ml_dtypes.bfloat16))
    return numpy_helper.from_array(array.astype(dtype))


def _info(spec: bindings.TensorSpec) -> onnx.ValueInfoProto:
    kind = TensorProto.DataType.Value(ELEMENT_TYPES[spec.dtype].onnx)
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of 256 bytes and one end-of-text token: every character splits into bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer
