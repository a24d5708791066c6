"""Models of one linear operator, with its weight in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper as oh
import torch

from lminf_export.operator.attention_body import OPSET
from lminf_export.operator.contract import DOMAIN
from lminf_export.operator.linear_bodies import (
    LINEAR_NBITS,
    LINEAR_NBITS_ADD,
    linear_body,
    nbits_body,
)
from lminf_export.quantize.formats import BlockFormat, dequantize_rows, quantize_rows
from tests.support.linear_sessions import TYPES, numbers


def linear_node(op_type: str, weight: np.ndarray, rank: int = 0) -> bytes:
    """A model of one node; `rank` is that of the addend."""
    kind, (out, width) = TYPES[weight.dtype.type], weight.shape
    shapes = {"x": ["M", width]} | ({"addend": [["M", out], [out]][2 - rank]} if rank else {})
    inputs = ["x", "weight", *(["addend"] if rank else [])]
    graph = oh.make_graph(
        [oh.make_node(op_type, inputs, ["y"], domain=DOMAIN)],
        "g",
        [oh.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [oh.make_tensor_value_info("y", kind, ["M", out])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    imports = [oh.make_opsetid("", OPSET), oh.make_opsetid(DOMAIN, 1)]
    model = oh.make_model(
        graph, opset_imports=imports, functions=[linear_body(op_type)], ir_version=10
    )
    return model.SerializeToString()


@dataclass(frozen=True)
class Weight:
    """A quantised weight: what a node of the operator takes, and the numbers it stands for."""

    form: BlockFormat
    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    offsets: None = None

    @classmethod
    def random(cls, form: BlockFormat, dtype: type, scales: type | None = None) -> Weight:
        whole = torch.from_numpy(numbers(1, (form.rows, form.columns), np.float32))
        blocks = quantize_rows(whole, form)
        # What pads the last block must not matter.
        columns = form.packed_shape[1] * form.packed_shape[2]
        used = -(-form.columns * form.bits // 8)
        blocks.packed.reshape(form.rows, columns)[:, used:] = 0xA5
        return cls(form, blocks.packed, blocks.scales.astype(scales or dtype), blocks.zero_points)

    @property
    def dense(self) -> np.ndarray:
        return dequantize_rows(self, self.form).astype(np.float64)  # type: ignore[arg-type]


def nbits_node(weight: Weight, level: int, rank: int, dtype: type | None = None) -> bytes:
    """A model of one node; `rank` is that of the addend, 0 for none; dtype: that of the scales."""
    form, kind = weight.form, TYPES[dtype or weight.scales.dtype.type]
    op_type = LINEAR_NBITS_ADD if rank else LINEAR_NBITS
    shapes = {"x": ["M", form.columns]}
    shapes |= {"addend": [["M", form.rows], [form.rows]][2 - rank]} if rank else {}
    constants = {"weight": weight.packed, "scales": weight.scales}
    zeros = {} if weight.zero_points is None else {"zero_points": weight.zero_points}
    inputs = ["x", *constants, *(["addend"] if rank else []), *zeros]
    node = oh.make_node(
        op_type, inputs, ["y"], domain=DOMAIN, K=form.columns, N=form.rows, bits=form.bits,
        block_size=form.block_size, accuracy_level=level,
    )  # fmt: skip
    graph = oh.make_graph(
        [node],
        "g",
        [oh.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [oh.make_tensor_value_info("y", kind, ["M", form.rows])],
        [onnx.numpy_helper.from_array(a, name) for name, a in (constants | zeros).items()],
    )
    domains = {"": OPSET, DOMAIN: 1, "com.microsoft": 1}
    model = oh.make_model(
        graph,
        opset_imports=[oh.make_opsetid(*pair) for pair in domains.items()],
        functions=[nbits_body(op_type, zero_points=True, half_scales=True)],
        ir_version=10,
    )
    return model.SerializeToString()
