"""The operator's forms against the mathematics: torch reference, torch op, ONNX function body."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from lminf_export.operator import contract, reference, torch_operator
from lminf_export.operator.attention_body import OPSET, BodyFeatures, function_body
from tests.support.operator_case import Case, History, shared_inputs

BASES = (0, 10**6, 2 * 10**8, 10**12)


def run_reference(case, inputs):
    return reference.lambda_attention(*inputs, **case.attributes())


def run_torch_op(case, inputs):
    return torch_operator.lambda_attention(*inputs, **case.attributes())


class OnnxNode:
    """One LambdaAttention node with its function body, in onnxruntime."""

    def __init__(
        self,
        case: Case,
        element=TensorProto.FLOAT,
        in_place: bool = False,
        kernels: Path | None = None,
        int8_cache: bool = False,
    ) -> None:
        self.case, self.in_place, self.int8_cache = case, in_place, int8_cache
        features = BodyFeatures(
            rotary=bool(case.rotary_dim),
            alibi=case.alibi,
            softcap=bool(case.softcap),
            sink_logits=case.sink_logits,
            int8_cache=int8_cache,
        )
        model = one_node_model(case, function_body(features), element)
        options = ort.SessionOptions()
        if kernels is not None:
            options.register_custom_ops_library(str(kernels))
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, case, inputs):
        arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]
        values = [ort.OrtValue.ortvalue_from_numpy(x) for x in arrays]
        binding = self.session.io_binding()
        named = dict(zip(contract.input_names(int8_cache=self.int8_cache), values, strict=True))
        for name, value in named.items():
            binding.bind_ortvalue_input(name, value)
        for name in contract.output_names(int8_cache=self.int8_cache):
            is_constant = "sink" in name and not case.num_sink_tokens
            if self.in_place and name.startswith("present") and not is_constant:
                binding.bind_ortvalue_output(name, named[name.replace("present", "past")])
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if self.in_place:
            assert outputs[1].data_ptr() == values[3].data_ptr()
        return [torch.from_numpy(x.numpy().copy()) for x in outputs]


def one_node_model(case: Case, function, element) -> onnx.ModelProto:
    int8_cache = function.name == contract.INT8_CACHE_OP_TYPE
    inputs = contract.inputs(int8_cache=int8_cache)
    outputs = contract.outputs(int8_cache=int8_cache)
    kinds = {
        "model": element,
        "ring": TensorProto.INT8 if int8_cache else element,
        "int64": TensorProto.INT64,
        "float32": TensorProto.FLOAT,
    }

    def infos(operands):
        return [helper.make_tensor_value_info(x.name, kinds[x.element], None) for x in operands]

    attributes = {**case.attributes(), "rotary_interleaved": int(case.interleaved)}
    node = helper.make_node(
        function.name,
        [x.name for x in inputs],
        [x.name for x in outputs],
        domain=contract.DOMAIN,
        plugin_namespace=contract.DOMAIN,
        **attributes,
    )
    graph = helper.make_graph([node], "one", infos(inputs), infos(outputs))
    return helper.make_model(
        graph,
        functions=[function],
        opset_imports=[
            helper.make_opsetid("", OPSET),
            helper.make_opsetid(contract.DOMAIN, 1),
        ],
        ir_version=11,
    )


def stream(form, case: Case, history: History, chunks, small_ring: bool = False):
    """Feed a stream in ragged chunks through one form of the operator; yield checked errors."""
    wanted = history.oracle()
    past = torch.tensor(history.bases)
    capacity = case.capacity
    if small_ring:
        assert max(history.bases) == 0
        capacity = min(capacity, max(max(c) for c in chunks))
    caches = history.caches(capacity)
    error = 0.0
    for new_lengths in chunks:
        new = torch.tensor(new_lengths)
        width = max(new_lengths)
        if small_ring and int(past.max()) + width > caches[0].shape[2]:
            caches[:2] = [grow(c, case.capacity) for c in caches[:2]]
        capacity = caches[0].shape[2]
        inputs = [
            *history.chunk(past, new, width),
            *caches,
            *shared_inputs(case, past, new, width, capacity),
        ]
        before = caches
        output, *caches = form(case, inputs)
        if not case.num_sink_tokens:
            caches[2:] = before[2:]
        for row, base in enumerate(history.bases):
            count, start = int(new[row]), int(past[row]) - base
            got = output[row, :, :count].double()
            assert torch.isfinite(output).all()
            if count:
                error = max(error, float((got - wanted[row, :, start : start + count]).abs().max()))
        past = past + new
    return error


def grow(ring, capacity):
    grown = torch.zeros(*ring.shape[:2], capacity, ring.shape[3], dtype=ring.dtype)
    grown[:, :, : ring.shape[2]] = ring
    return grown


def random_chunks(case: Case, rows: int, steps: int, seed: int):
    rng = np.random.default_rng(seed)
    chunks = []
    for _ in range(steps):
        new = rng.integers(0, case.chunk_size + 1, size=rows)
        new[rng.integers(rows)] = max(1, new.max())
        chunks.append([int(n) for n in new])
    return chunks


def total(chunks):
    return max(sum(c[row] for c in chunks) for row in range(len(chunks[0])))


CASES = {
    "plain": Case(),
    "interleaved": Case(interleaved=True),
    "full_rotation": Case(rotary_dim=12),
    "yarn": Case(attention_factor=1.3),
    "alibi": Case(rotary_dim=0, alibi=True),
    "no_position": Case(rotary_dim=0),
    "softcap": Case(softcap=2.0),
    "learned_sink_logits": Case(sink_logits=True),
    "no_sinks": Case(num_sink_tokens=0),
    "more_sinks_than_window": Case(num_sink_tokens=17, window_size=5),
    "window_of_one": Case(window_size=1, num_sink_tokens=2),
    "chunk_above_window": Case(window_size=5, chunk_size=11),
    "single_tokens_ring_equals_window": Case(window_size=7, chunk_size=1),
    "far_limit": Case(distance_limit=29),
    "one_head": Case(num_heads=1, num_kv_heads=1),
    "all_heads": Case(num_heads=5, num_kv_heads=5),
}
# float32 rounding of logits and sums of a few dozen terms of size one; the reference is float64.
TOLERANCE = 2e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", BASES)
def test_reference_ring_equals_distances(name, base):
    case = CASES[name]
    chunks = random_chunks(case, rows=3, steps=24, seed=base % 97)
    history = History(
        case, [base, base + 5, base + 131 if base else 0], total(chunks), torch.float64
    )
    # Caches are rotated by float32 digit tables: their rounding is what remains.
    assert stream(run_reference, case, history, chunks) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("in_place", [False, True])
def test_onnx_body_equals_distances(name, base, in_place):
    case = CASES[name]
    chunks = random_chunks(case, rows=3, steps=24, seed=base % 89 + in_place)
    history = History(
        case, [base, base + 5, base + 131 if base else 0], total(chunks), torch.float32
    )
    assert stream(OnnxNode(case, in_place=in_place), case, history, chunks) < TOLERANCE


@pytest.mark.parametrize("in_place", [False, True])
def test_small_ring_grown_by_a_front_copy(in_place):
    case = Case(window_size=29, chunk_size=7)
    chunks = random_chunks(case, rows=2, steps=30, seed=5)
    history = History(case, [0, 0], total(chunks), torch.float32)
    assert (
        stream(OnnxNode(case, in_place=in_place), case, history, chunks, small_ring=True)
        < TOLERANCE
    )


cases = st.builds(
    Case,
    window_size=st.integers(1, 19),
    num_sink_tokens=st.integers(0, 23),
    chunk_size=st.integers(1, 23),
    interleaved=st.booleans(),
    rotary_dim=st.sampled_from([0, 2, 8, 12]),
    attention_factor=st.sampled_from([1.0, 1.3]),
    softcap=st.sampled_from([0.0, 3.0]),
    alibi=st.booleans(),
    sink_logits=st.booleans(),
    seed=st.integers(0, 2**16),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases, base=st.sampled_from(BASES), in_place=st.booleans(), seed=st.integers(0, 999))
def test_every_form_equals_distances(case, base, in_place, seed):
    chunks = random_chunks(case, rows=2, steps=12, seed=seed)
    history = History(case, [base, base + seed], total(chunks), torch.float32)
    for form in (run_reference, run_torch_op, OnnxNode(case, in_place=in_place)):
        assert stream(form, case, history, chunks) < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "alibi", "no_sinks"])
def test_torch_op_passes_opcheck(name):
    case = CASES[name]
    history = History(case, [3, 0], 5, torch.float32)
    past, new = torch.tensor(history.bases), torch.tensor([5, 4])
    inputs = [
        *history.chunk(past, new, 5),
        *history.caches(case.capacity),
        *shared_inputs(case, past, new, 5, case.capacity),
    ]
    torch.library.opcheck(
        torch.ops.lminf.lambda_attention.default, tuple(inputs), case.attributes()
    )
