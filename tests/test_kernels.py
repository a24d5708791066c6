"""The CPU kernel against the mathematics, on every instruction set this processor has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

import lminf_export
from benchmarks.support.operator_case import Case, History, shared_inputs
from benchmarks.support.operator_node import OnnxNode, one_node_model
from lminf_export.errors import SessionError
from lminf_export.operator.attention_body import BodyFeatures, function_body
from lminf_export.runtime.kernels import INSTALLED, find_kernels, open_library
from tests.support.kernel_sets import HAS_COMPILER, SETS, instruction_set, needs_kernels
from tests.support.operator_streams import (
    BASES,
    CASES,
    TOLERANCE,
    cases,
    random_chunks,
    stream,
    total,
)
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

pytestmark = needs_kernels
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=SETS)
def kernels(request):
    """The installed library, on one instruction set."""
    with instruction_set(request.param):
        yield INSTALLED


def test_installing_with_a_compiler_builds_the_kernels():
    assert INSTALLED.is_file()
    assert open_library(INSTALLED).providers == ("cpu",)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_distances(name, kernels):
    case = CASES[name]
    for base in BASES:
        in_place = bool(base)
        chunks = random_chunks(case, rows=3, steps=9, seed=base % 83)
        bases = [base, base + 5, base + 131 if base else 0]
        history = History(case, bases, total(chunks), torch.float32)
        form = OnnxNode(case, in_place=in_place, kernels=kernels)
        assert stream(form, case, history, chunks) < TOLERANCE


LARGE = {
    # Many keys: several tiles and split keys; many rows: transposed tiles; sizes no unit divides.
    "long_window": (Case(window_size=607, chunk_size=131, head_dim=32, rotary_dim=32), 6),
    "one_query_head": (
        Case(window_size=331, chunk_size=37, num_heads=2, head_dim=64, rotary_dim=64),
        11,
    ),
    "odd_head_dim": (Case(window_size=293, chunk_size=67, head_dim=86, rotary_dim=20), 10),
    "many_sinks": (Case(window_size=83, num_sink_tokens=271, chunk_size=101, head_dim=16), 9),
    "alibi_softcap_learned": (
        Case(
            window_size=307,
            chunk_size=89,
            num_heads=8,
            head_dim=48,
            rotary_dim=0,
            alibi=True,
            softcap=3.0,
            sink_logits=True,
        ),
        9,
    ),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", LARGE)
def test_tiles_and_split_keys_equal_distances(name, kernels):
    case, steps = LARGE[name]
    chunks = [[case.chunk_size, case.chunk_size - 1]] * steps + [[1, 1]] * 3
    history = History(case, [0, 10**9], total(chunks), torch.float32)
    form = OnnxNode(case, in_place=True, kernels=kernels)
    assert stream(form, case, history, chunks) < TOLERANCE


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases, base=st.sampled_from(BASES), in_place=st.booleans(), seed=st.integers(0, 999))
def test_any_case_equals_distances(case, base, in_place, seed):
    chunks = random_chunks(case, rows=2, steps=12, seed=seed)
    history = History(case, [base, base + seed], total(chunks), torch.float32)
    form = OnnxNode(case, in_place=in_place, kernels=INSTALLED)
    assert stream(form, case, history, chunks) < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "interleaved", "no_sinks", "more_sinks_than_window"])
def test_half_precision_errs_less_than_the_function_body(name, kernels):
    case = CASES[name]
    chunks = random_chunks(case, rows=3, steps=24, seed=3)
    history = History(case, [0, 10**6, 131], total(chunks), torch.float16)
    errors = [
        stream(
            OnnxNode(case, TensorProto.FLOAT16, in_place=True, kernels=library),
            case,
            history,
            chunks,
        )
        for library in (kernels, None)
    ]
    assert errors[0] <= errors[1]


def test_small_ring_grown_by_a_front_copy():
    case = Case(window_size=29, chunk_size=7)
    chunks = random_chunks(case, rows=2, steps=30, seed=5)
    history = History(case, [0, 0], total(chunks), torch.float32)
    form = OnnxNode(case, in_place=True, kernels=INSTALLED)
    assert stream(form, case, history, chunks, small_ring=True) < TOLERANCE


def inputs_of(case, bases, new, width, capacity=None):
    history = History(case, bases, width, torch.float32)
    past = torch.tensor(bases)
    capacity = capacity or case.capacity
    return [
        *history.chunk(past, torch.tensor(new), width),
        *history.caches(capacity),
        *shared_inputs(case, past, torch.tensor(new), width, capacity),
    ]


def test_padding_reaches_neither_output_nor_cache():
    case = CASES["plain"]
    inputs = inputs_of(case, [40, 7], [2, 0], 5)
    before = [x.clone() for x in inputs[3:7]]
    output, *present = OnnxNode(case, kernels=INSTALLED)(case, inputs)
    assert bool((output[0, :, 2:] == 0).all())
    assert bool((output[1] == 0).all())
    for old, new in zip(before, present, strict=True):
        assert torch.equal(old[1], new[1])
    changed = (before[0][0] != present[0][0]).any(-1).any(0).nonzero().flatten()
    assert set(changed.tolist()) == {40 % case.capacity, 41 % case.capacity}


def test_threads_do_not_change_the_result():
    case = Case(window_size=1031, chunk_size=131, head_dim=32, rotary_dim=32)
    features = BodyFeatures()
    model = one_node_model(case, function_body(features), TensorProto.FLOAT).SerializeToString()
    inputs = inputs_of(case, [5000], [1], 1)
    results = []
    for threads in (1, 3):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(INSTALLED))
        form = OnnxNode(case, kernels=INSTALLED)
        form.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results.append(form(case, inputs)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: [
                *(*x[:3], *(ring[:, :, :9].clone() for ring in x[3:5]), *x[5:10]),
                *(x[10][:, :9].clone(), *x[11:]),
            ],
            r"ring slots C = 9: must be at least window_size \+ S - 1 = 13 \+ 2 - 1",
        ),
        (lambda x: [*x[:2], x[2][:, :1].clone(), *x[3:]], r"value has shape \(1, 1, 2, 12\)"),
        (lambda x: [*x[:7], torch.tensor([-1]), *x[8:]], "past_length is negative"),
        (lambda x: [*x[:8], torch.tensor([3]), *x[9:]], "new_length is outside"),
        (lambda x: [*x[:7], torch.tensor([2**40]), *x[8:]], "beyond 2"),
    ],
    ids=["small_ring", "wrong_shape", "negative_past", "long_chunk", "too_far"],
)
def test_wrong_arguments_end_the_step_in_words(change, message):
    case = CASES["plain"]
    form = OnnxNode(case, kernels=INSTALLED)
    with pytest.raises(Exception, match=message):
        form(case, change(inputs_of(case, [50], [2], 2)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return TinyModel(sliding_window=5).write(tmp_path_factory.mktemp("b") / "tiny")


def operators_run(bundle, kernels, folder):
    """Kinds of operators in the profile of one step, with how often each ran."""
    from lminf_export.runtime.onnxruntime import OnnxRuntimeSession

    session = OnnxRuntimeSession(bundle, threads=1, kernels=kernels, profile=folder / "p")
    state = session.new_state(1)
    one = np.ones(1, np.int64)
    session.step(state, np.zeros((1, 1), np.int64), one, np.zeros((1, 1), np.int64))
    events = json.loads(session.end_profiling().read_text())
    return [e["args"]["op_name"] for e in events if e.get("name", "").endswith("kernel_time")]


def test_the_kernel_takes_the_operators_place(bundle, tmp_path):
    fused = operators_run(bundle, "auto", tmp_path)
    plain = operators_run(bundle, "none", tmp_path)
    assert fused.count("LambdaAttention") == 2
    assert not {"TensorScatter", "Softmax", "Where"} & set(fused)
    assert "LambdaAttention" not in plain
    assert plain.count("TensorScatter") == 4


@pytest.mark.slow
def test_a_layer_runs_few_operators_and_no_copy_of_a_cache(tmp_path):
    counts = []
    for layers in (2, 3):
        folder = save_llama(tmp_path / f"m{layers}", num_hidden_layers=layers)
        bundle = lminf_export.export(folder, tmp_path / f"b{layers}", window_size=16, chunk_size=8)
        (tmp_path / str(layers)).mkdir()
        counts.append(Counter(operators_run(bundle, "auto", tmp_path / str(layers))))
    a_layer = counts[1] - counts[0]
    assert a_layer["LambdaAttention"] == 1
    assert not {"TensorScatter", "MatMul", "Softmax", "Where", "Concat"} & set(a_layer)
    # 5 projections and 2 that add the residual, 4 reshapes and 4 transposes around attention, 2
    # norms, SwiGLU's 2.
    assert (a_layer["Linear"], a_layer["LinearAdd"]) == (5, 2)
    assert sum(a_layer.values()) == 20


def test_both_forms_give_the_same_logits(bundle):
    ids = np.random.default_rng(3).integers(0, 257, (2, 61))
    found = []
    for kernels in ("auto", "none", INSTALLED):
        model = lminf_export.load(bundle.path, threads=1, kernels=kernels)
        state = model.new_state(2)
        parts = [model.forward(ids[:, i : i + 5], state) for i in range(0, 61, 5)]
        found.append(np.concatenate(parts, axis=1))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    np.testing.assert_array_equal(found[0], found[2])


def test_a_session_says_what_computes_its_attention(bundle):
    assert "liblminf_ort.so" in lminf_export.load(bundle.path).session.attention
    plain = lminf_export.load(bundle.path, kernels="none")
    assert plain.session.attention == "the graph's function body"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (lambda: b"no library", "is not a kernel library of lminf-export, or is damaged"),
        (lambda: INSTALLED.read_bytes()[:50_000], "is cut short"),
        (lambda: Path(_some_library()).read_bytes(), "is not a kernel library"),
    ],
    ids=["missing", "text", "truncated", "another_library"],
)
def test_a_wrong_library_costs_one_line(bundle, tmp_path, content, message):
    path = tmp_path / "liblminf_ort.so"
    if content is not None:
        path.write_bytes(content())
    with pytest.raises(SessionError, match=message) as raised:
        lminf_export.load(bundle.path, kernels=path)
    assert "\n" not in str(raised.value)


def _some_library() -> str:
    import numpy._core._multiarray_umath as found

    return found.__file__


def test_a_provider_without_a_kernel_gets_the_function_body():
    assert find_kernels("auto", "cuda") is None
    with pytest.raises(SessionError, match="not for provider 'cuda'"):
        find_kernels(INSTALLED, "cuda")


def test_the_command_line_chooses_the_kernels(bundle, tmp_path):
    command = [sys.executable, "-m", "lminf_export.cli.main", "generate", str(bundle.path)]
    command += ["--prompt", "ab", "--max-new-tokens", "5", "-v", "--kernels"]
    outputs = [
        subprocess.run([*command, k], capture_output=True, text=True) for k in ("auto", "none")
    ]
    assert outputs[0].stdout == outputs[1].stdout
    assert "liblminf_ort.so" in outputs[0].stderr
    assert "function body" in outputs[1].stderr
    wrong = subprocess.run([*command, "nowhere.so"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: kernel library nowhere.so does not exist")


def test_our_declarations_are_those_of_onnxruntimes_header(tmp_path):
    places = [Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime")]
    if given := os.environ.get("ONNXRUNTIME_INCLUDE_DIR"):
        places.insert(0, Path(given))
    include = next((p for p in places if (p / "onnxruntime_c_api.h").is_file()), None)
    if include is None or not HAS_COMPILER:
        pytest.skip("onnxruntime's header is not installed (onnxruntime_c_api.h)")
    source = ROOT / "plugins/onnxruntime/ort_abi_check.cc"
    subprocess.run(["c++", "-std=c++17", "-fsyntax-only", f"-I{include}", source], check=True)
