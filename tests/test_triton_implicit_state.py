"""The graph whose state Triton carries: equal to the bundle over many windows."""

from __future__ import annotations

import runpy
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from lminf_export import load
from lminf_export.operator.bindings import BATCH, LOGITS_INDEX, NEW_LENGTH, PAST_LENGTH
from lminf_export.runtime.kernels import AUTO, find_kernels
from lminf_export.triton.implicit_state import (
    PRESENT_LENGTH,
    READY,
    START,
    STATE_LENGTH,
    implicit_state_graph,
    write_implicit_state,
)
from tests.support.tiny_bundle import TinyModel

# Odd pieces, a whole chunk, single tokens; more than four windows of the demo model.
PIECES = (1, 7, 256, 255, 100, 33, 256, 1, 1, 256, 64)
TINY_PIECES = (3, 1, 4, 2, 4, 4, 1, 4, 3, 4, 4, 4, 1)


def one_thread():
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return options


class Carrier:
    """What Triton does: hands the outputs of one request to the next, a row for each sequence."""

    def __init__(self, bundle, path, rows, *, kernels):
        write_implicit_state(bundle, path / "model.onnx")
        for name in bundle.manifest.files_of("weights"):
            shutil.copyfile(bundle.path / name, path / name)
        options = one_thread()
        if kernels:
            found = find_kernels(AUTO, "cpu", bundle.manifest.kv_cache_dtype)
            options.register_custom_ops_library(str(found.path))
        self.session = ort.InferenceSession(str(path / "model.onnx"), options)
        contract = bundle.manifest.contract
        sizes = {**contract.ring_sizes(), BATCH: rows}
        # Rubbish, which is not to be read: only lengths begin at zero.
        rng = np.random.default_rng(9)
        self.state = {STATE_LENGTH: np.full((rows, 1), 77)}
        self.next = {PRESENT_LENGTH: STATE_LENGTH}
        past, present = (contract.caches(present=flag) for flag in (False, True))
        for before, after in zip(past, present, strict=True):
            shape = before.sized(sizes)
            numbers = rng.integers(-3, 4, shape) if before.dtype == "int8" else rng.random(shape)
            self.state[before.name] = numbers.astype(before.dtype)
            self.next[after.name] = before.name

    def run(self, ids, start, ready=None):
        rows = len(ids)
        inputs = {
            "input_ids": ids, START: np.reshape(start, (rows, 1)),
            READY: np.ones((rows, 1), bool) if ready is None else np.reshape(ready, (rows, 1)),
            **self.state,
        }  # fmt: skip
        names = [output.name for output in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, inputs), strict=True))
        self.state = {before: found[after] for after, before in self.next.items()}
        return found["logits"]


def has_kernels():
    return find_kernels(AUTO, "cpu") is not None


@pytest.mark.parametrize("kernels", [False, True])
def test_a_carried_state_is_the_bundle_s_over_four_windows(demo_lm, tmp_path, kernels):
    if kernels and not has_kernels():
        pytest.skip("no kernels are built here")
    bundle = demo_lm.bundle
    lm = load(bundle.path, kernels="auto" if kernels else "none", threads=1)
    carrier, state = Carrier(bundle, tmp_path, 2, kernels=kernels), lm.new_state(2)
    rng = np.random.default_rng(0)
    for number, size in enumerate(PIECES):
        ids = rng.integers(5, lm.vocab_size, (2, size))
        logits = carrier.run(ids, [number == 0] * 2)
        expected = lm.forward(ids, state, logits="last")
        np.testing.assert_array_equal(logits.reshape(2, -1), expected.reshape(2, -1))
    assert carrier.state[STATE_LENGTH].ravel().tolist() == [sum(PIECES)] * 2
    assert sum(PIECES) > 4 * bundle.manifest.lambda_config.window_size


@pytest.mark.slow
def test_a_row_begins_anew_and_another_waits(demo_lm, tmp_path):
    lm = load(demo_lm.bundle.path, kernels="none", threads=1)
    carrier = Carrier(lm.bundle, tmp_path, 3, kernels=False)
    session = ort.InferenceSession(str(lm.bundle.graph_path), one_thread())

    def bare(ids, past, new, state):
        """The bundle's own graph, given what its caller must reckon."""
        caches = {name: array for name, array in state.items() if name != STATE_LENGTH}
        lengths = {
            PAST_LENGTH: past,
            NEW_LENGTH: new,
            LOGITS_INDEX: np.maximum(new - 1, 0)[:, None],
        }
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, {"input_ids": ids, **lengths, **caches})
        outputs = dict(zip(names, found, strict=True))
        return outputs.pop("logits"), outputs

    states = [lm.new_state(1) for _ in range(3)]
    rng = np.random.default_rng(1)
    for number, size in enumerate(PIECES[:9]):
        ids = rng.integers(5, lm.vocab_size, (3, size))
        start = [number == 0, number in (0, 4), number in (0, 7)]
        ready = [True, True, number % 3 != 1]
        before = dict(carrier.state)
        logits = carrier.run(ids, start, ready)
        past = np.where(start, 0, before[STATE_LENGTH].ravel())
        logits_there, caches = bare(ids, past, np.where(ready, size, 0), before)
        np.testing.assert_array_equal(logits, logits_there)
        for present, name in carrier.next.items():
            if present in caches:
                np.testing.assert_array_equal(carrier.state[name], caches[present])
        for row in range(3):
            if start[row] and number:
                states[row] = lm.new_state(1)
            if ready[row]:
                # A row by itself has its products summed in another order.
                expected = lm.forward(ids[row : row + 1], states[row], logits="last")
                np.testing.assert_allclose(logits[row].ravel(), expected.ravel(), atol=2e-5)
    lengths = carrier.state[STATE_LENGTH].ravel().tolist()
    assert lengths == [int(state.past_length[0]) for state in states]
    assert len(set(lengths)) == 3


@pytest.mark.parametrize("fields", [{"kv_cache_dtype": "int8"}, {"sliding_window": 5}])
def test_other_caches_are_carried_too(tmp_path, fields):
    tiny = TinyModel(head_dim=32, vocab_size=61, **fields)
    lm = load(tiny.write(tmp_path / "tiny").path, kernels="none", threads=1)
    (tmp_path / "graph").mkdir()
    carrier = Carrier(lm.bundle, tmp_path / "graph", 2, kernels=False)
    state, rng = lm.new_state(2), np.random.default_rng(2)
    most = lm.bundle.manifest.lambda_config.chunk_size
    for number, size in enumerate(TINY_PIECES):
        ids = rng.integers(0, 61, (2, min(size, most)))
        logits = carrier.run(ids, [number == 0] * 2)
        expected = lm.forward(ids, state, logits="last")
        np.testing.assert_array_equal(logits.reshape(2, -1), expected.reshape(2, -1))


@pytest.mark.parametrize("kernels", [False, True])
def test_more_than_a_chunk_is_refused_and_not_answered_wrongly(demo_lm, tmp_path, kernels):
    if kernels and not has_kernels():
        pytest.skip("no kernels are built here")
    carrier = Carrier(demo_lm.bundle, tmp_path, 1, kernels=kernels)
    chunk = demo_lm.bundle.manifest.lambda_config.chunk_size
    carrier.run(np.full((1, chunk), 5), [True])
    # Within the ring's slots, where the function of the graph would overwrite keys in use.
    with pytest.raises(Exception, match=f"at_most_{chunk}_new_tokens"):
        carrier.run(np.full((1, chunk + 1), 5), [False])
    assert carrier.run(np.full((1, chunk), 5), [False]).size


def test_the_bundle_s_own_graph_stays_as_it_is(demo_lm):
    before = demo_lm.bundle.graph_path.read_bytes()
    graph = implicit_state_graph(demo_lm.bundle).graph
    assert demo_lm.bundle.graph_path.read_bytes() == before
    assert {START, READY, STATE_LENGTH} <= {value.name for value in graph.input}
    assert PRESENT_LENGTH in {value.name for value in graph.output}


class Server:
    """What the example's client calls, over `Carrier`: rows are sequences, one at a time."""

    def __init__(self, carrier):
        self.carrier, self.flags = carrier, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, model, inputs, *, sequence_id, sequence_start, sequence_end):
        assert isinstance(sequence_id, str)
        self.flags.append((sequence_start, sequence_end))
        logits = self.carrier.run(inputs[0].array, [sequence_start])
        return types.SimpleNamespace(as_numpy=lambda name: logits)


class Input:
    def __init__(self, name, shape, datatype):
        assert (name, datatype) == ("input_ids", "INT64")
        self.shape = shape

    def set_data_from_numpy(self, array):
        assert self.shape == list(array.shape)
        self.array = array


def test_the_example_s_client_writes_what_the_bundle_does(demo_lm, tmp_path, monkeypatch, capsys):
    server = Server(Carrier(demo_lm.bundle, tmp_path, 1, kernels=False))
    module = types.ModuleType("tritonclient.grpc")
    module.InferInput, module.InferenceServerClient = Input, lambda url: server
    monkeypatch.setitem(sys.modules, "tritonclient", types.ModuleType("tritonclient"))
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", module)
    sys.modules["tritonclient"].grpc = module
    text = "It is a truth universally acknowledged, that a single man"
    command = [
        "implicit_client.py", "--tokenizer", str(demo_lm.bundle.tokenizer_path), "--tokens", "24",
        "--chunk", "5", text,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    example = Path(__file__).parents[1] / "examples" / "triton" / "implicit_client.py"
    runpy.run_path(str(example), run_name="__main__")
    lm = load(demo_lm.bundle.path, kernels="none", threads=1)
    ids = Tokenizer.from_file(str(demo_lm.bundle.tokenizer_path)).encode(text).ids
    expected = list(lm.generate(ids, max_new_tokens=24, stop_token_ids=frozenset()))
    tokenizer = Tokenizer.from_file(str(demo_lm.bundle.tokenizer_path))
    assert capsys.readouterr().out == tokenizer.decode([*ids, *expected]) + "\n"
    assert server.flags[0] == (True, False)
    assert server.flags[-1] == (False, True)
    assert set(server.flags[1:-1]) == {(False, False)}
