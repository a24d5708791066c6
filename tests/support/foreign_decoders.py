"""Small decoders as other tools write them, by hand, and what each of them computes in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lminf_export.operator.reference import attend_by_distance

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
VOCABULARY, WIDTH, TABLE_ROWS = 61, 24, 128


@dataclass(frozen=True)
class Spec:
    """What the attention of a small decoder computes."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    layers: int = 1
    scale: float | None = None  # D^(-1/2) where None
    rotary_dim: int = 16
    theta: float = 500.0
    interleaved: bool = False
    window: int | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: str = ""  # "", "learned" or "zero"
    qk_norm: bool = False
    bias: bool = False

    @property
    def factor(self) -> float:
        """The factor of the logits."""
        return self.dim**-0.5 if self.scale is None else self.scale

    @property
    def inv_freq(self) -> Array:
        """(R/2,) float32 radians per token."""
        powers = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        return (np.float32(1) / np.float32(self.theta) ** powers).astype(np.float32)

    @property
    def slopes(self) -> Array:
        """(H,) ALiBi's."""
        return (2.0 ** -np.arange(1, self.heads + 1)).astype(np.float32)

    def angles(self, rows: int = TABLE_ROWS) -> Array:
        """(rows, R/2) float32."""
        return np.arange(rows, dtype=np.float32)[:, None] * self.inv_freq

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Weights by name, float32."""
        rng = np.random.default_rng(7)
        shapes: dict[str, tuple[int, ...]] = {
            "embed": (VOCABULARY, WIDTH),
            "head": (WIDTH, VOCABULARY),
        }
        for i in range(self.layers):
            shapes |= {
                f"q{i}": (WIDTH, self.heads * self.dim),
                f"k{i}": (WIDTH, self.kv_heads * self.dim),
                f"v{i}": (WIDTH, self.kv_heads * self.dim),
                f"o{i}": (self.heads * self.dim, WIDTH),
                f"q_bias{i}": (self.heads * self.dim,),
                f"k_bias{i}": (self.kv_heads * self.dim,),
                f"v_bias{i}": (self.kv_heads * self.dim,),
                f"q_norm{i}": (self.dim,),
                f"k_norm{i}": (self.dim,),
                f"sinks{i}": (self.heads,),
            }
        return {
            name: (rng.standard_normal(shape) / (WIDTH**0.5 if len(shape) > 1 else 1.0)).astype(
                np.float32
            )
            for name, shape in shapes.items()
        }


class Graph:
    """A graph that is written node by node: `graph.Add(a, b)` returns the name of the sum.

    Args:
        spec: what it computes.
        opset: of the standard's operators.
        ids: element type of the tokens.
        dtype: of weights and caches.
    """

    def __init__(
        self, spec: Spec, opset: int = 23, ids: int = TensorProto.INT64, dtype: Any = np.float32
    ) -> None:
        self.spec, self.opset, self.dtype = spec, opset, np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.outputs: dict[str, onnx.ValueInfoProto] = {}
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.input("input_ids", ids, ["B", "S"])

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def node(*inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
            count = len(self.nodes)
            names = [f"{op_type}_{count}_{k}" for k in range(outputs)]
            self.nodes.append(
                helper.make_node(
                    op_type, inputs, names, domain=domain, name=f"{op_type}_{count}", **attributes
                )
            )
            return names[0] if outputs == 1 else names

        return node

    @property
    def element(self) -> int:
        """The element type of weights and caches."""
        return helper.np_dtype_to_tensor_dtype(self.dtype)

    def input(self, name: str, kind: int, shape: list[Any]) -> str:
        """Declare an input once."""
        self.inputs.setdefault(name, helper.make_tensor_value_info(name, kind, shape))
        return name

    def mask(self) -> str:
        """Return the input attention_mask."""
        return self.input("attention_mask", TensorProto.INT64, ["B", "T"])

    def positions(self) -> str:
        """Return the input position_ids."""
        return self.input("position_ids", TensorProto.INT64, ["B", "S"])

    def past(self, layer: int, kind: str, slots: Any = "P") -> str:
        """Return the input with earlier keys or values."""
        shape = ["B", self.spec.kv_heads, slots, self.spec.dim]
        return self.input(f"past_key_values.{layer}.{kind}", self.element, shape)

    def present(self, layer: int, kind: str, value: str, slots: Any = "T") -> None:
        """Give a value out as the new keys or values."""
        shape = ["B", self.spec.kv_heads, slots, self.spec.dim]
        self.output(f"present.{layer}.{kind}", value, self.element, shape)

    def output(self, name: str, value: str, kind: int, shape: list[Any] | None) -> None:
        """Give a value out, once."""
        if name in self.outputs:
            return
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs[name] = helper.make_tensor_value_info(name, kind, shape)

    def array(self, value: Any, dtype: Any = None) -> str:
        """Return a constant."""
        array = np.asarray(value, self.dtype if dtype is None else dtype)
        name = f"constant_{len(self.tensors)}"
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        """Return a constant list."""
        return self.array(values, np.int64)

    def integer(self, value: int) -> str:
        """Return a constant number."""
        return self.array(value, np.int64)

    def weight(self, name: str) -> str:
        """Return a weight of the specification."""
        if name not in self.tensors:
            array = self.spec.weights[name].astype(self.dtype)
            self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def heads(self, x: str, count: int) -> str:
        """(B, S, heads·D) → (B, heads, S, D)."""
        shaped = self.Reshape(x, self.ints(0, 0, count, self.spec.dim))
        return str(self.Transpose(shaped, perm=[0, 2, 1, 3]))

    def flat(self, x: str) -> str:
        """(B, heads, S, D) → (B, S, heads·D)."""
        return str(self.Reshape(self.Transpose(x, perm=[0, 2, 1, 3]), self.ints(0, 0, -1)))

    def size(self, x: str, axis: int) -> str:
        """Return a size as a list of one number."""
        return str(self.Shape(x, start=axis, end=axis + 1))

    def model(self) -> onnx.ModelProto:
        """Return the finished graph."""
        graph = helper.make_graph(
            self.nodes,
            "foreign",
            list(self.inputs.values()),
            list(self.outputs.values()),
            list(self.tensors.values()),
        )
        domains = {node.domain for node in self.nodes} - {""}
        opsets = [
            helper.make_opsetid("", self.opset),
            *(helper.make_opsetid(d, 1) for d in domains),
        ]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


Attend = Callable[[Graph, str, str, str, int], str]


def decoder(graph: Graph, attend: Attend, *, normed_of: Callable[..., str] | None = None) -> None:
    """Write embedding, layers of attention, and head into a graph.

    Args:
        graph: an empty one.
        attend: writes one attention: of queries, keys and values (B, S, heads·D) and the layer
            returns (B, S, H·D).
        normed_of: changes a layer's input before the products.
    """
    spec = graph.spec
    hidden = graph.Gather(graph.weight("embed"), "input_ids")
    for i in range(spec.layers):
        square = graph.ReduceMean(graph.Mul(hidden, hidden), graph.ints(-1))
        normed = graph.Div(hidden, graph.Sqrt(graph.Add(square, graph.array(1e-5))))
        if normed_of is not None:
            normed = normed_of(graph, normed)
        projected = []
        for name in "qkv":
            product = graph.MatMul(normed, graph.weight(f"{name}{i}"))
            biased = spec.bias and not getattr(attend, "takes_bias", False)
            projected.append(
                graph.Add(product, graph.weight(f"{name}_bias{i}")) if biased else product
            )
        found = attend(graph, *projected, i)
        hidden = graph.Add(hidden, graph.MatMul(found, graph.weight(f"o{i}")))
    logits = graph.MatMul(hidden, graph.weight("head"))
    graph.output("logits", logits, graph.element, ["B", "S", VOCABULARY])


def truth(spec: Spec, ids: Array, *, window: int, sinks: int) -> Array:
    """Return the logits (T, V) of one sequence with Λ-attention, in float64.

    Args:
        spec: what a layer's attention computes by itself.
        ids: (T,) tokens.
        window: of Λ-attention; a layer's own window stays.
        sinks: starting tokens that layers that see everything keep.
    """
    weights = {name: torch.from_numpy(x).double() for name, x in spec.weights.items()}
    own = spec.window is not None
    at = torch.arange(len(ids))[None]
    hidden = weights["embed"][torch.from_numpy(ids)][None]
    learned: dict[str, Callable[[int], torch.Tensor | None]] = {
        "": lambda i: None,
        "learned": lambda i: weights[f"sinks{i}"],
        "zero": lambda i: torch.zeros(spec.heads).double(),
    }
    for i in range(spec.layers):
        normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        rows = []
        for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
            x = normed @ weights[f"{name}{i}"]
            x = x + weights[f"{name}_bias{i}"] if spec.bias else x
            x = x.unflatten(-1, (heads, spec.dim)).transpose(1, 2)
            if spec.qk_norm and name != "v":
                x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                x = x * weights[f"{name}_norm{i}"]
            rows.append(x)
        seen = spec.window if spec.window is not None else window
        found = attend_by_distance(
            *rows,
            at,
            at,
            window_size=seen,
            num_sink_tokens=0 if own else sinks,
            distance_limit=seen,
            scale=spec.factor,
            inv_freq=torch.from_numpy(spec.inv_freq) if spec.rotary_dim else None,
            interleaved=spec.interleaved,
            softcap=spec.softcap,
            alibi_slopes=torch.from_numpy(spec.slopes).double() if spec.alibi else None,
            sink_logits=learned[spec.sinks](i),
        )
        hidden = hidden + found.transpose(1, 2).flatten(-2) @ weights[f"o{i}"]
    logits: Array = (hidden @ weights["head"])[0].numpy()
    return logits


class Original:
    """A foreign graph that runs token by token, its caches led from call to call."""

    def __init__(self, path: Path, slots: int | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options)
        self.past, self.slots = 0, slots
        self.caches: dict[str, Array] = {}

    def _input(self, value: Any, ids: Array) -> Array:
        kinds = {
            "tensor(int64)": np.int64,
            "tensor(int32)": np.int32,
            "tensor(float16)": np.float16,
            "tensor(float)": np.float32,
        }
        dtype, past, total = kinds[value.type], self.past, self.past + len(ids)
        row = np.arange(past, total)
        arrays = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total)),
            "position_ids": row[None],
            "cache_position": row,
            "past_seq_len": np.full((1, 1)[: len(value.shape)], total - 1),
            "seqlens_k": np.full((1, 1)[: len(value.shape)], total - 1),
            "total_seq_len": np.full((1,) * len(value.shape), total),
            "nonpad_kv_seqlen": np.array([total]),
            "write_indices": np.array([past]),
            "past_sequence_length": np.array([past]),
        }
        if value.name in arrays:
            return np.asarray(arrays[value.name], dtype)
        open_sizes = {"B": 1, "P": 0, "C": self.slots}
        shape = [n if isinstance(n, int) else open_sizes[n] for n in value.shape]
        return self.caches.get(value.name, np.zeros(shape, dtype))

    def step(self, ids: Array) -> Array:
        """Return the logits (S, V) of the next tokens."""
        feeds = {value.name: self._input(value, ids) for value in self.session.get_inputs()}
        names = [value.name for value in self.session.get_outputs()]
        found: dict[str, Any] = dict(zip(names, self.session.run(names, feeds), strict=True))
        self.past += len(ids)
        for name, array in found.items():
            self.caches[name.replace("present", "past_key_values")] = array
        logits: Array = found["logits"][0]
        return logits
