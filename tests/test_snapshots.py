"""Snapshots: a state goes on from one as if nothing had come between, in any session."""

from __future__ import annotations

import ast
import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lminf_export
from lminf_export.errors import SessionError
from lminf_export.operator import bindings
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.one_stream import OneStream
from lminf_export.runtime.snapshot import Snapshot
from tests.support.kinds_of_session import KINDS, opened
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(sliding_window=5)
LENGTHS = [3, 1, 7]
PACKAGE = Path(lminf_export.__file__).parent


@pytest.fixture(params=KINDS)
def lm(request, tmp_path, monkeypatch):
    return opened(request.param, tmp_path, monkeypatch, TINY)


def begun(lm, count=2):
    """Return a state whose streams have read chunks of different lengths."""
    state = lm.new_state(3)
    rng = np.random.default_rng(5)
    for _ in range(count):
        lm.forward(rng.integers(0, lm.vocab_size, (3, 7)), state, lengths=LENGTHS, logits="none")
    return state


def decoded(lm, state, count):
    """Return the logits of a few tokens and chunks, rows of different lengths among them."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(count):
        found.append(lm.forward(rng.integers(0, lm.vocab_size, (len(state.past_length), 1)), state))
    ids = rng.integers(0, lm.vocab_size, (len(state.past_length), 6))
    found.append(lm.forward(ids, state, lengths=np.arange(len(ids)) + 2, logits="last"))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("count", [0, 2, 9], ids=["new", "before the rings are full", "wrapped"])
def test_a_restored_state_goes_on_with_equal_logits(lm, count):
    state = begun(lm, count)
    saved = lm.session.snapshot(state)
    # Rings have 21 and 14 slots: they grow or wrap, several times, in between.
    wanted = decoded(lm, state, 60)
    lm.session.restore(state, saved)
    assert state.past_length.tolist() == [count * length for length in LENGTHS]
    np.testing.assert_array_equal(decoded(lm, state, 60), wanted)
    fresh = lm.new_state(3)
    lm.session.restore(fresh, saved)
    assert saved.nbytes <= fresh.nbytes <= fresh.max_nbytes
    np.testing.assert_array_equal(decoded(lm, fresh, 60), wanted)


def test_taking_a_snapshot_changes_nothing_and_the_snapshot_stays_as_it_is(lm):
    state, other = begun(lm), begun(lm)
    saved = lm.session.snapshot(state)
    kept = {name: array.copy() for name, array in saved.to_arrays().items()}
    assert saved.nbytes < state.nbytes
    np.testing.assert_array_equal(decoded(lm, state, 30), decoded(lm, other, 30))
    for name, array in saved.to_arrays().items():
        np.testing.assert_array_equal(array, kept[name])
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_another_session_of_the_bundle_restores_it(tmp_path, monkeypatch):
    first = opened("onnxruntime", tmp_path, monkeypatch, TINY)
    second = load(first.bundle.path, threads=1, kernels="none")
    state, again = begun(first), second.new_state(3)
    second.session.restore(again, first.session.snapshot(state))
    np.testing.assert_array_equal(decoded(second, again, 30), decoded(first, state, 30))


def test_an_engine_goes_on_where_the_graph_stopped(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    graph = opened("onnxruntime", tmp_path, monkeypatch, TINY)
    engine = opened("engine", tmp_path / "a", monkeypatch, TINY)
    state, again = begun(graph), engine.new_state(3)
    engine.session.restore(again, graph.session.snapshot(state))
    # float32 sums of a few dozen terms in another order.
    np.testing.assert_allclose(decoded(engine, again, 30), decoded(graph, state, 30), atol=1e-4)


def test_rows_of_a_snapshot_are_streams_of_their_own(lm):
    state = begun(lm)
    saved = lm.session.snapshot(state).rows([2, 0])
    part = lm.new_state(2)
    lm.session.restore(part, saved)
    assert part.past_length.tolist() == [14, 6]
    ids = np.array([[5], [7], [3]])
    wanted = lm.forward(ids, state)
    np.testing.assert_allclose(lm.forward(ids[[2, 0]], part), wanted[[2, 0]], atol=1e-4)


def test_what_was_restored_over_leaves_no_trace(lm):
    saved = lm.session.snapshot(lm.new_state(3))
    state = lm.new_state(3)
    lm.session.stand_at(state, 10**6)
    lm.session.fill(state, np.random.default_rng(0))
    assert all(array.any() for array in lm.session.snapshot(state).caches.values())
    lm.session.restore(state, saved)
    assert not any(array.any() for array in lm.session.snapshot(state).caches.values())
    np.testing.assert_array_equal(decoded(lm, state, 5), decoded(lm, lm.new_state(3), 5))


def test_a_snapshot_of_other_caches_or_streams_is_refused_in_one_line(lm, tmp_path):
    saved = lm.session.snapshot(begun(lm))
    with pytest.raises(SessionError, match=r"^this snapshot has 3 streams, the state has 2; .*$"):
        lm.session.restore(lm.new_state(2), saved)
    state = lm.new_state(3)
    other = replace(saved, contract=replace(saved.contract, layers=saved.contract.layers[:1]))
    with pytest.raises(SessionError, match=r"^this snapshot is of another bundle: .*$"):
        lm.session.restore(state, other)
    assert state.past_length.tolist() == [0, 0, 0]


def test_a_snapshot_survives_a_file(lm, tmp_path):
    state = begun(lm)
    np.savez(tmp_path / "s.npz", **lm.session.snapshot(state).to_arrays())
    with np.load(tmp_path / "s.npz") as arrays:
        saved = Snapshot.from_arrays(state.contract, dict(arrays))
    again = lm.new_state(3)
    lm.session.restore(again, saved)
    np.testing.assert_array_equal(decoded(lm, again, 20), decoded(lm, state, 20))


DAMAGES = {
    "no lengths": lambda x: x.pop(bindings.PAST_LENGTH),
    "other caches": lambda x: x.pop(bindings.past_name(1, "key")),
    "of another bundle": lambda x: x.update({bindings.past_name(0, "key"): np.zeros((3, 1, 5, 4))}),
    "lacks some of 99 tokens": lambda x: x.update(
        {bindings.PAST_LENGTH: np.array([1, 99, 2])}
        | {name: array[:, :, :9] for name, array in x.items() if name.endswith(("key", "value"))}
        | {name: array for name, array in x.items() if "sink" in name}
    ),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_arrays_that_are_no_snapshot_are_refused(reason, tmp_path, monkeypatch):
    lm = opened("onnxruntime", tmp_path, monkeypatch, TINY)
    state = begun(lm, 5)
    arrays = lm.session.snapshot(state).to_arrays()
    DAMAGES[reason](arrays)
    with pytest.raises(SessionError, match=reason):
        Snapshot.from_arrays(state.contract, arrays)


def test_a_watched_step_also_returns_values_of_the_graph(tmp_path, monkeypatch):
    lm = opened("onnxruntime", tmp_path, monkeypatch, TINY)
    graph = TINY.graph.graph
    embedding, head = graph.node[0].output[0], graph.node[-1].input[0]
    seen = []
    session = lm.session.watch([head, embedding], seen.append)
    watched = LanguageModel(lm.bundle, session)
    state, plain = begun(watched), begun(lm)
    seen.clear()
    ids = np.arange(6).reshape(3, 2)
    logits = watched.forward(ids, state)
    np.testing.assert_array_equal(logits, lm.forward(ids, plain))
    (values,) = seen
    assert list(values) == [head, embedding]
    np.testing.assert_array_equal(values[head], logits)
    assert values[embedding].shape == (3, 2, TINY.num_heads * TINY.head_dim)
    watched.forward(ids, state)
    assert not np.array_equal(seen[1][head], values[head]), "values are copies"
    assert not lm.session.owns(state)


def test_a_value_that_is_not_in_the_graph_cannot_be_watched(tmp_path, monkeypatch):
    lm = opened("onnxruntime", tmp_path, monkeypatch, TINY)
    with pytest.raises(SessionError, match="no_such_value"):
        lm.session.watch(["no_such_value"], print)


def test_an_engine_cannot_be_watched_and_says_so_in_one_line(tmp_path, monkeypatch):
    lm = opened("engine", tmp_path, monkeypatch, TINY)
    with pytest.raises(SessionError, match=r"^an engine returns its outputs only, not a, b; .*$"):
        lm.session.watch(["a", "b"], print)


def users_of_sessions():
    return [
        *(PACKAGE / "bench").glob("*.py"),
        *(PACKAGE / "evaluate").glob("*.py"),
        PACKAGE / "verify" / "routing_check.py",
    ]


@pytest.mark.parametrize("path", users_of_sessions(), ids=lambda path: path.stem)
def test_measurements_know_no_concrete_session_and_no_private_name(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    concrete = ("onnxruntime", "onnxruntime_state", "tensorrt", "tensorrt_state")
    assert not modules & {f"lminf_export.runtime.{name}" for name in concrete}
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            is_own = base == "self" or node.attr in own or node.attr.startswith("__")
            assert is_own or base == "hashlib", f"{path.name}:{node.lineno}: {node.attr}"


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda snapshot: pickle.loads(pickle.dumps(snapshot)),
    "replace": lambda snapshot: replace(snapshot, unread=(5,)),
    "replace of a copy": lambda snapshot: replace(copy.copy(snapshot), context=(5,)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_snapshot_stays_as_it_is_whatever_becomes_of_the_first(lm, kind):
    state = begun(lm)
    first = state.snapshot()
    second = COPIES[kind](first)
    expected = {name: array.copy() for name, array in first.caches.items()}
    lengths = first.past_length.copy()
    state.reset()
    lm.forward([[1], [2], [3]], state, logits="none")
    latest = state.snapshot(into=first)
    assert all(np.array_equal(second.caches[name], array) for name, array in expected.items())
    assert np.array_equal(second.past_length, lengths)
    with pytest.raises(SessionError, match="has no caches"):
        state.restore(first)
    state.restore(second)
    assert np.array_equal(state.past_length, lengths)
    # What was given to one of them is what is returned.
    other = lm.new_state(3)
    lm.forward([[4], [5], [6]], other, logits="none")
    again = other.snapshot(into=second)
    plain = other.snapshot()
    assert all(np.array_equal(again.caches[name], x) for name, x in plain.caches.items())
    assert latest.furthest == 1


def test_a_stream_whose_state_was_put_back_has_unread_all_it_was_given(lm):
    stream = OneStream(lm)
    stream.add([1, 2, 3, 4, 5])
    stream.read(0)
    earlier = stream.state.snapshot()
    stream.add([6, 7, 8, 9])
    stream.read(0)
    stream.state.restore(earlier)
    assert stream.unread == [6, 7, 8, 9]
    stream.add([6, 7])
    stream.state.reset()
    assert (stream.unread, stream.position) == ([6, 7, 8, 9, 6, 7], 6)


def test_bytes_are_those_of_the_file(demo_lm, tmp_path):
    state = demo_lm.new_state(2)
    demo_lm.forward([[1, 2, 3], [4, 5, 6]], state)
    snapshot = state.snapshot()
    snapshot.save(tmp_path / "state")
    data = snapshot.to_bytes()
    assert data == (tmp_path / "state").read_bytes()
    found = demo_lm.snapshot_from_bytes(data)
    assert all(np.array_equal(found.caches[name], snapshot.caches[name]) for name in found.caches)
    for wrong in (b"", data[:-1], data + b"0", data[:-9] + b"x" + data[-8:]):
        with pytest.raises(SessionError, match="damaged"):
            demo_lm.snapshot_from_bytes(wrong)
