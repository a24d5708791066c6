"""A small graph as onnxruntime-genai's builder writes it: fused attention, products in blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from lminf_export.operator.linear_bodies import CONTRIB_DOMAIN

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 32, 4, 2, 16, 53, 2
_BLOCK = 16


class ForeignGraph:
    """Writes such a graph, its weights beside it.

    Args:
        zero_points: products have them.
        bias: products have one, as an input of theirs.
        ordered: products have an order of features, which LinearNBits does not know.
        norms_of_heads: queries and keys are normed by head, between Reshapes.
    """

    def __init__(
        self,
        *,
        zero_points: bool = False,
        bias: bool = False,
        ordered: bool = False,
        norms_of_heads: bool = False,
    ) -> None:
        self.zero_points, self.bias, self.ordered = zero_points, bias, ordered
        self.norms_of_heads = norms_of_heads
        self.rng = np.random.default_rng(7)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []

    def save(self, folder: Path) -> Path:
        """Write model.onnx and its weights; return the folder."""
        mask = "attention_mask"
        self.node("ReduceSum", [mask, self.const("one", [1])], "sum", keepdims=0)
        self.node("Sub", ["sum", "one"], "last")
        self.node("Cast", ["last"], "last32", to=TensorProto.INT32)
        self.node("Shape", [mask], "shape")
        self.node("Gather", ["shape", self.const("place", 1)], "total")
        self.node("Cast", ["total"], "total32", to=TensorProto.INT32)
        self.weight("table", (VOCAB, HIDDEN))
        self.node("Gather", ["table", "input_ids"], "x0")
        self.node("SimplifiedLayerNormalization", ["x0", self.scale("n0")], "h0", axis=-1)
        x, h = "x0", "h0"
        for layer in range(LAYERS):
            attended = self.attention(layer, h)
            x, h = self.skip(
                f"a{layer}", x, self.product(f"o{layer}", attended, HEADS * HEAD_DIM, HIDDEN)
            )
            gate = self.product(f"gate{layer}", h, HIDDEN, 2 * HIDDEN)
            up = self.product(f"up{layer}", h, HIDDEN, 2 * HIDDEN)
            self.node("Sigmoid", [gate], f"s{layer}")
            self.node("Mul", [gate, f"s{layer}"], f"g{layer}")
            self.node("Mul", [f"g{layer}", up], f"m{layer}")
            down = self.product(f"down{layer}", f"m{layer}", 2 * HIDDEN, HIDDEN)
            x, h = self.skip(f"b{layer}", x, down)
        self.product("head", h, HIDDEN, VOCAB, result="logits")
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save_model(
            self.model(), folder / "model.onnx", save_as_external_data=True,
            location="model.onnx.data", size_threshold=64,
        )  # fmt: skip
        return folder

    def attention(self, layer: int, h: str) -> str:
        """Return what the tokens attend to."""
        width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        if self.norms_of_heads:
            query = self.normed(f"q{layer}", self.product(f"wq{layer}", h, HIDDEN, width[0]))
            key = self.normed(f"k{layer}", self.product(f"wk{layer}", h, HIDDEN, width[1]))
            operands = [query, key, self.product(f"wv{layer}", h, HIDDEN, width[1])]
        else:
            operands = [self.product(f"qkv{layer}", h, HIDDEN, width[0] + 2 * width[1]), "", ""]
        caches = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        tables = [self.table(name) for name in ("cos", "sin")]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*operands, *caches, "last32", "total32", *tables],
                [f"att{layer}", f"present.{layer}.key", f"present.{layer}.value"],
                domain=CONTRIB_DOMAIN,
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            )
        )
        return f"att{layer}"

    def normed(self, name: str, value: str) -> str:
        """Return queries or keys that are normed by head."""
        width = HEADS if name.startswith("q") else KV_HEADS
        split, joined = [0, -1, HEAD_DIM], [0, -1, width * HEAD_DIM]
        self.node("Reshape", [value, self.const(f"{name}.split", split)], f"{name}.heads")
        norm = [f"{name}.heads", self.scale(f"{name}.scale", HEAD_DIM)]
        self.node("SimplifiedLayerNormalization", norm, f"{name}.normed", axis=-1)
        target = self.const(f"{name}.joined", joined)
        return self.node("Reshape", [f"{name}.normed", target], f"{name}.flat")

    def skip(self, name: str, x: str, more: str) -> tuple[str, str]:
        """Return the residual stream and its norm."""
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, more, self.scale(f"n{name}")],
                [f"h{name}", "", "", f"x{name}"],
                domain=CONTRIB_DOMAIN,
            )
        )
        return f"x{name}", f"h{name}"

    def product(self, name: str, x: str, features: int, out: int, result: str = "") -> str:
        """Return a product with a weight in blocks of 4 bits."""
        blocks = features // _BLOCK
        packed = self.rng.integers(0, 256, (out, blocks, _BLOCK // 2), np.uint8)
        scales = self.rng.uniform(0.01, 0.05, (out, blocks)).astype(np.float32)
        inputs = [x, self.add(f"{name}.w", packed), self.add(f"{name}.s", scales)]
        zeros = self.rng.integers(0, 256, (out, (blocks + 1) // 2), np.uint8)
        inputs.append(self.add(f"{name}.z", zeros) if self.zero_points else "")
        order = (np.arange(features) // _BLOCK).astype(np.int32)
        inputs.append(self.add(f"{name}.order", order) if self.ordered else "")
        addend = self.rng.standard_normal(out).astype(np.float32)
        inputs.append(self.add(f"{name}.b", addend) if self.bias else "")
        while not inputs[-1]:
            inputs.pop()
        return self.node(
            "MatMulNBits", inputs, result or f"{name}.y", CONTRIB_DOMAIN,
            K=features, N=out, bits=4, block_size=_BLOCK, accuracy_level=4,
        )  # fmt: skip

    def table(self, name: str) -> str:
        """Return the table of cosines or sines."""
        angles = np.outer(np.arange(128), 100.0 ** -np.linspace(0, 1, HEAD_DIM // 2))
        values = (np.cos if name == "cos" else np.sin)(angles.astype(np.float32))
        return self.add(name, values.astype(np.float32))

    def scale(self, name: str, width: int = HIDDEN) -> str:
        """Return a norm's weight."""
        return self.add(name, self.rng.uniform(0.5, 1.5, width).astype(np.float32))

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """Return a weight in float32."""
        return self.add(name, self.rng.standard_normal(shape).astype(np.float32))

    def const(self, name: str, value: object) -> str:
        """Return a constant of int64."""
        return self.add(name, np.array(value, np.int64))

    def add(self, name: str, array: np.ndarray) -> str:
        """Add a tensor once; return its name."""
        if all(tensor.name != name for tensor in self.tensors):
            self.tensors.append(onnx.numpy_helper.from_array(array, name))
        return name

    def node(
        self, kind: str, inputs: list[str], result: str, domain: str = "", **attributes: int
    ) -> str:
        """Add a node of one result; return that."""
        self.nodes.append(helper.make_node(kind, inputs, [result], domain=domain, **attributes))
        return result

    def model(self) -> onnx.ModelProto:
        """Return the whole model."""
        cache = ["batch", KV_HEADS, "past", HEAD_DIM]
        present = ["batch", KV_HEADS, "total", HEAD_DIM]
        pairs = [(layer, kind) for layer in range(LAYERS) for kind in ("key", "value")]
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "foreign",
            [
                info("input_ids", TensorProto.INT64, ["batch", "new"]),
                info("attention_mask", TensorProto.INT64, ["batch", "total"]),
                *(
                    info(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, cache)
                    for layer, kind in pairs
                ),
            ],
            [
                info("logits", TensorProto.FLOAT, ["batch", "new", VOCAB]),
                *(
                    info(f"present.{layer}.{kind}", TensorProto.FLOAT, present)
                    for layer, kind in pairs
                ),
            ],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB_DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
