"""`lminf::LinearNBits` and `LinearNBitsAdd`: the kernel against NumPy, and in a quantised model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch

import lminf_export
from lminf_export.linear_function import LINEAR_NBITS, LINEAR_NBITS_ADD, nbits_body
from lminf_export.onnx_function import OPSET
from lminf_export.op import DOMAIN
from lminf_export.quantize.blocks import BlockFormat, dequantize_rows, quantize_rows
from lminf_export.quantize.config import BLOCK_SIZES, QuantizeConfig
from lminf_export.runtime.kernels import INSTALLED
from tests.kernel_sets import INTEGER_SETS, available_sets, instruction_set, needs_kernels
from tests.test_linear import TYPES, numbers, session, steps_events
from tests.tiny_models import save_llama

# Few tokens and many; features that no block, vector or panel divides, and some that all do.
TOKENS = (0, 1, 2, 3, 5, 17, 64, 200)
FEATURES = ((1, 1), (5, 37), (67, 1031), (131, 300), (64, 512))
EXACT, ROUNDED = 1, 4


@dataclass(frozen=True)
class Weight:
    """A quantised weight: what a node of the operator takes, and the numbers it stands for."""

    form: BlockFormat
    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None

    @classmethod
    def random(cls, form: BlockFormat, dtype: type) -> Weight:
        whole = torch.from_numpy(numbers(1, (form.rows, form.columns), np.float32))
        blocks = quantize_rows(whole, form)
        # What pads the last block must not matter.
        columns = form.packed_shape[1] * form.packed_shape[2]
        used = -(-form.columns * form.bits // 8)
        blocks.packed.reshape(form.rows, columns)[:, used:] = 0xA5
        return cls(form, blocks.packed, blocks.scales.astype(dtype), blocks.zero_points)

    @property
    def dense(self) -> np.ndarray:
        return dequantize_rows(self, self.form).astype(np.float64)  # type: ignore[arg-type]


def one_node(weight: Weight, level: int, rank: int) -> bytes:
    """A model of one node; `rank` is that of the addend, 0 for none."""
    form, kind = weight.form, TYPES[weight.scales.dtype.type]
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
        functions=[nbits_body(op_type, zero_points=bool(zeros))],
        ir_version=10,
    )
    return model.SerializeToString()


def rounded(x: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations rounded block by block, and how far a tie that falls the other way takes each."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, -x.shape[1] % block_size)))
    blocks = padded.reshape(len(x), padded.shape[1] // block_size, block_size)
    scale = np.abs(blocks).max(2, keepdims=True) / 127
    levels = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    # float32 holds a level to 2⁻¹⁷, and two operations make it.
    tie = np.abs(np.abs(levels - np.rint(levels)) - 0.5) < 2.0**-15
    both = np.rint(levels) * scale, tie * scale
    flat = [a.reshape(padded.shape)[:, : x.shape[1]] for a in both]
    return flat[0], flat[1]


@needs_kernels
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", [EXACT, ROUNDED])
def test_the_kernel_is_the_product_with_the_dequantised_weight(level, bits, block_size):
    sets = available_sets(INTEGER_SETS)
    cases = product((np.float32, np.float16), (True, False), FEATURES)
    for turn, (dtype, symmetric, (out, width)) in enumerate(cases):
        form, rank = BlockFormat(out, width, bits, block_size, symmetric), turn % 3
        weight = Weight.random(form, dtype)
        model, dense = one_node(weight, level, rank), weight.dense
        runs = [session(model, str(INSTALLED), threads) for threads in (1, 2)]
        for tokens in TOKENS:
            x = numbers(tokens, (tokens, width), dtype)
            addend = numbers(2, (tokens, out)[2 - rank :], dtype) if rank else np.zeros(1)
            feed = {"x": x} | ({"addend": addend} if rank else {})
            near, slack = rounded(x, block_size) if level == ROUNDED else (x.astype(np.float64), 0)
            wanted = near @ dense.T + addend
            # Sums in float32, however they are ordered; ties that fall the other way; one
            # rounding to the result's type.
            size = np.abs(near) @ np.abs(dense).T + 1
            bound = size * 2.0**-20 + np.abs(wanted) * np.finfo(dtype).eps
            bound += np.abs(slack) @ np.abs(dense).T if level == ROUNDED else 0
            for name in sets:
                with instruction_set(name):
                    found = [run.run(None, feed)[0] for run in runs]
                np.testing.assert_array_equal(found[0], found[1])
                assert found[0].shape == wanted.shape
                wrong = np.abs(found[0] - wanted) > bound
                assert not wrong.any(), (name, dtype, symmetric, out, width, rank, tokens)
