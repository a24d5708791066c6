"""onnxruntime on a GPU, as far as it can be held to without one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest

import lminf_export
from lminf_export.errors import SessionError
from lminf_export.runtime import kernels, onnxruntime, onnxruntime_cuda
from lminf_export.runtime.load import load
from lminf_export.runtime.onnxruntime_cuda import CudaCall, CudaGraphs
from tests.support.tiny_bundle import TinyModel

ROOT = Path(__file__).parents[1]
TINY = TinyModel(sliding_window=5)
# Inputs that kernels of the CUDA provider read in main memory: by operator, the first of them.
READ_IN_MAIN_MEMORY = {
    "Reshape": 1,
    "Expand": 1,
    "Slice": 1,
    "Split": 1,
    "Unsqueeze": 1,
    "Squeeze": 1,
    "Range": 0,
    "ConstantOfShape": 0,
}
WRITES_TO_THE_GPU = ("Range", "ConstantOfShape", "Expand", "Reshape")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return TINY.write(tmp_path_factory.mktemp("b") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo-llama", "demo-mpt"])
def test_no_size_meets_a_length_where_onnxruntime_would_copy_it_to_a_gpu(name, tmp_path):
    # Such a copy in every step would also keep onnxruntime from capturing a CUDA graph.
    exported = lminf_export.export(ROOT / "examples" / name, tmp_path / "b", check=False)
    model = onnx.load(exported.graph_path, load_external_data=False)
    assert misplaced(model.graph) == []
    assert misplaced(onnx.inliner.inline_local_functions(model).graph) == []


def misplaced(graph):
    """Return the nodes on a GPU that read a size, which lies in main memory, as a number."""
    constants = {x.name for x in graph.initializer}
    here, found = set(), []
    for node in graph.node:
        given = [name for name in node.input if name]
        if node.op_type == "Constant" or (given and all(x in constants for x in given)):
            constants.update(node.output)
        elif node.op_type == "Shape":
            here.update(node.output)
        elif node.op_type in WRITES_TO_THE_GPU:
            found += misread(node, here)
        elif any(x in here for x in given) and all(x in here or x in constants for x in given):
            here.update(node.output)
        else:
            found += misread(node, here)
    return found


def misread(node, here):
    first = READ_IN_MAIN_MEMORY.get(node.op_type, len(node.input))
    return [f"{node.op_type} {x}" for x in node.input[:first] if x in here]


def test_a_size_that_meets_a_length_is_found():
    graph = onnx.parser.parse_graph(
        "g (int64[b] length, float[b, c] ring) => (int64[b] slot)"
        "{ size = Shape <start = 1, end = 2> (ring) slot = Mod (length, size) }"
    )
    assert misplaced(graph) == ["Mod size"]


def test_a_call_with_fixed_addresses_gives_the_logits_of_one_with_arrays(bundle):
    model = load(bundle.path, threads=1, kernels="none")
    ids = np.random.default_rng(3).integers(0, TINY.vocab_size, (2, 24))
    wanted, fixed = (model.new_state(2, full=True) for _ in range(2))
    for start, width, count in ((0, 7, 7), (7, 1, 1), (8, 1, 1), (9, 4, 0), (13, 1, 1)):
        chunk = ids[:, start : start + width]
        step = (chunk, np.full(2, width), np.tile(np.arange(count), (2, 1)))
        bound = fixed._bound
        call = CudaCall(
            fixed.session,
            CudaGraphs("there is no GPU"),
            bound.past_length,
            bound.caches,
            width,
            count,
            TINY.vocab_size,
            (),
            device="cpu",
        )
        logits, seconds = call.run(*step)
        np.testing.assert_array_equal(logits, model.session.step(wanted, *step))
        assert seconds > 0
        for state in (wanted, fixed):
            state.advance(step[1])


def test_every_state_has_a_graph_of_its_own_for_single_tokens_only(monkeypatch):
    monkeypatch.setattr(onnxruntime_cuda, "MOST_GRAPHS", 2)
    graphs = CudaGraphs(None)
    shapes = ((1, 1), (64, 1), (1, 0), (1, 1), (1, 1))
    ids = [graphs.run_options(*shape).get_run_config_entry("gpu_graph_id") for shape in shapes]
    assert ids == ["1", "-1", "-1", "2", "-1"]
    assert graphs.description == (
        "no, because 2 states of this session have one; later ones have none"
    )
    assert CudaGraphs("it was not asked for").run_options(1, 1) is None


def test_a_graph_that_onnxruntime_does_not_capture_is_opened_without_and_says_so(
    bundle, monkeypatch
):
    opened = []

    def refusing(*arguments, graphs, **settings):
        opened.append(graphs)
        if graphs:
            cause = RuntimeError("This session cannot use the graph capture feature as requested")
            raise SessionError("onnxruntime cannot load it") from cause
        return "a session"

    monkeypatch.setattr(onnxruntime, "_open_session", refusing)
    session, graphs = onnxruntime._open_with_graphs(
        bundle.graph_path, "cuda", None, None, None, lean=False
    )
    assert (session, opened) == ("a session", [True, False])
    assert graphs.description.startswith("no, because onnxruntime runs part of this graph")


def test_any_other_refusal_stays_an_error(bundle, monkeypatch):
    def failing(*arguments, **settings):
        raise SessionError("onnxruntime cannot load it") from RuntimeError("no such operator")

    monkeypatch.setattr(onnxruntime, "_open_session", failing)
    with pytest.raises(SessionError, match="cannot load"):
        onnxruntime._open_with_graphs(bundle.graph_path, "cuda", None, None, None, lean=False)


def test_on_a_cpu_no_cuda_graph_is_played(bundle):
    assert load(bundle.path).session.cuda_graph == "no, because the provider is cpu"


def test_a_head_that_no_cuda_kernel_takes_runs_in_the_body_or_is_refused_by_name(
    monkeypatch, caplog, tmp_path
):
    library = kernels.KernelLibrary(Path("x.so"), "avx2", ("cpu", "cuda"), ("cpu",), (64, 128))
    monkeypatch.setattr(kernels, "open_library", lambda path: library)
    monkeypatch.setattr(kernels, "is_file", lambda path: True)
    assert kernels.find_kernels("auto", "cuda", None, {64}) is library
    assert kernels.find_kernels("auto", "cpu", None, {32}) is library
    assert kernels.find_kernels("auto", "cuda", None, {32, 64}) is None
    assert "no CUDA kernels for head_dim 32 (it takes 64, 128)" in caplog.text
    with pytest.raises(SessionError, match=r"head_dim 32 .*kernels='none'"):
        kernels.find_kernels("x.so", "cuda", None, {32})


class Cudart:
    """A runtime whose device memory is the host's."""

    def __init__(self, refusal=0):
        self.refusal, self.calls = refusal, []

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("register", size.value))
        return self.refusal

    def cudaHostUnregister(self, address):
        self.calls.append("unregister")
        return 0

    def cudaMemcpy(self, target, source, size, kind):
        assert kind == 2  # device to host
        ctypes.memmove(target, source, size)
        return self.refusal

    def cudaGetLastError(self):
        self.calls.append("cleared")
        return self.refusal


def test_logits_are_read_into_pages_that_are_locked_and_given_back(monkeypatch):
    cudart, there = Cudart(), np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    monkeypatch.setattr(onnxruntime_cuda.ctypes, "CDLL", lambda name: cudart)
    copy = onnxruntime_cuda.LockedCopy.like(np.zeros_like(there))
    np.testing.assert_array_equal(copy.read(there.ctypes.data), there)
    del copy
    assert cudart.calls == [("register", 24), "unregister"]


def test_pages_that_cannot_be_locked_leave_the_copy_to_onnxruntime(monkeypatch):
    cudart = Cudart(refusal=712)
    monkeypatch.setattr(onnxruntime_cuda.ctypes, "CDLL", lambda name: cudart)
    assert onnxruntime_cuda.LockedCopy.like(np.zeros((1, 1, 3), np.float32)) is None
    assert cudart.calls == [("register", 12), "cleared"]
