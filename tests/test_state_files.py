"""States in files: they go on exactly, and nothing that is damaged or foreign is taken."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.support.mutations import mutate_bytes, mutate_safetensors
from lminf_export.errors import InputError, LminfError, SessionError
from lminf_export.operator import bindings
from lminf_export.runtime import state_file
from lminf_export.runtime.load import load
from lminf_export.runtime.snapshot import Snapshot
from tests.support.kinds_of_session import KINDS, opened
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(sliding_window=5, head_dim=32, vocab_size=61)
INT8 = TinyModel(sliding_window=5, head_dim=32, vocab_size=61, kv_cache_dtype="int8")
LENGTHS = [40, 3, 17]


@pytest.fixture(params=KINDS)
def lm(request, tmp_path, monkeypatch):
    return opened(request.param, tmp_path, monkeypatch, TINY)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return load(TINY.write(tmp_path_factory.mktemp("b") / "bundle").path, threads=1)


def begun(lm, lengths=tuple(LENGTHS)):
    state = lm.new_state(len(lengths))
    ids = np.random.default_rng(0).integers(0, lm.vocab_size, (len(lengths), max(lengths)))
    lm.forward(ids, state, lengths=lengths, logits="none")
    return state


def logits_after(lm, state):
    ids = np.random.default_rng(1).integers(0, lm.vocab_size, (state.batch_size, 30))
    return lm.forward(ids, state)


def test_a_saved_state_goes_on_as_if_it_had_not_been_saved(lm, tmp_path):
    state = begun(lm)
    state.save(tmp_path / "s", unread=[5, 6])
    wanted = logits_after(lm, state)
    again = lm.load_state(tmp_path / "s")
    assert again.past_length.tolist() == LENGTHS
    np.testing.assert_array_equal(logits_after(lm, again), wanted)
    assert state.load(str(tmp_path / "s")) == (5, 6)
    np.testing.assert_array_equal(logits_after(lm, state), wanted)
    assert lm.load_snapshot(tmp_path / "s").unread == (5, 6)


def test_forks_are_states_of_their_own(lm):
    state = begun(lm)
    forks = state.fork(3)
    wanted = logits_after(lm, state)
    for fork in forks:
        np.testing.assert_array_equal(logits_after(lm, fork), wanted)
    assert begun(lm, [7]).fork(1)[0].furthest == 7
    for n in (0, -1, 1.5, None):
        with pytest.raises(InputError):
            state.fork(n)


def test_forks_of_a_view_are_full_states(lm):
    state = lm.new_state(3, full=True)
    lm.forward([[1, 2, 3]] * 3, state, logits="none")
    (fork,) = state.rows(1, 3).fork(1)
    assert fork.batch_size == 2
    lm.forward([[4], [4]], fork)
    assert fork.rows(0, 1).furthest == 4
    assert state.past_length.tolist() == [3, 3, 3]


def test_a_primed_state_continues_as_the_whole_prompt_does(lm):
    whole = list(lm.generate([5, 6, 7, 8, 9], max_new_tokens=20, stop_token_ids=()))
    for fork in lm.prime([5, 6, 7]).fork(2):
        found = lm.generate([8, 9], max_new_tokens=20, stop_token_ids=(), state=fork)
        assert list(found) == whole
    for wrong in ([], [61], [[1]], 5, None, [1.5]):
        with pytest.raises(InputError):
            lm.prime(wrong)


def test_a_snapshot_holds_the_slots_that_tokens_have_used_and_its_memory_is_used_again(lm):
    state = begun(lm, [4, 2, 1])
    contract = state.contract
    used = {full: min(full, 4) for full in contract.ring_capacities}
    first = state.snapshot()
    assert first.nbytes == 3 * contract.cache_bytes(used)
    assert first.rows([2]).nbytes == contract.cache_bytes(dict.fromkeys(used, 1))
    logits_after(lm, state)
    second = state.snapshot()
    third = state.snapshot(into=second)
    assert second.nbytes == 0
    with pytest.raises(SessionError, match="no caches"):
        state.restore(second)
    wanted = logits_after(lm, state)
    state.restore(third)
    np.testing.assert_array_equal(logits_after(lm, state), wanted)
    grown = state.snapshot(into=first)
    state.restore(grown)
    with pytest.raises(InputError):
        state.snapshot(into=5)


def test_the_file_is_safetensors_of_its_owner_alone(graph, tmp_path):
    path = tmp_path / "s"
    state = begun(graph)
    saved = state.snapshot()
    saved.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    arrays = load_file(path)
    assert arrays.keys() == saved.to_arrays().keys()
    for name, array in saved.to_arrays().items():
        np.testing.assert_array_equal(arrays[name], array)
    assert saved.nbytes < path.stat().st_size < saved.nbytes + 8192


def test_a_file_is_replaced_in_one_step_or_not_at_all(graph, tmp_path, monkeypatch):
    path = tmp_path / "s"
    begun(graph, [1]).save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file.os, "fsync", full)
    with pytest.raises(InputError, match=r"^cannot write .*: No space left on device$"):
        begun(graph, [9]).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("kind", ["folder", "missing", "missing/s", "null\0", "n" * 400, None, 7])
def test_a_path_that_holds_no_file_is_one_line(graph, tmp_path, kind):
    (tmp_path / "folder").mkdir()
    path = tmp_path / kind if isinstance(kind, str) else kind
    with pytest.raises(InputError):
        graph.load_state(path)
    if kind != "missing":
        with pytest.raises(InputError):
            begun(graph).save(path)
    assert os.listdir(tmp_path) == ["folder"]


def test_files_of_another_bundle_or_batch_are_refused(graph, tmp_path):
    path = tmp_path / "s"
    state = begun(graph)
    state.save(path)
    before = logits_after(graph, state)
    state.load(path)
    other = load(replace(TINY, seed=1).write(tmp_path / "other").path, threads=1)
    for model in (other, load(INT8.write(tmp_path / "int8").path, threads=1)):
        with pytest.raises(SessionError, match="another bundle"):
            model.load_state(path)
        with pytest.raises(SessionError, match="another bundle"):
            model.new_state(3).restore(state.snapshot())
    for lengths in ([1, 1], [1]):
        with pytest.raises(SessionError, match=r"has streams \(3,\), the state has"):
            begun(graph, lengths).load(path)
    np.testing.assert_array_equal(logits_after(graph, state), before)


def test_an_engine_of_the_bundle_takes_files_of_its_graph(tmp_path, monkeypatch):
    engine = opened("engine", tmp_path, monkeypatch, TINY)
    model = load(engine.bundle.path, threads=1, kernels="none", provider="cpu")
    begun(model).save(tmp_path / "s")
    found = logits_after(engine, engine.load_state(tmp_path / "s"))
    np.testing.assert_allclose(found, logits_after(model, begun(model)), atol=2e-4)


def rewritten(content, change):
    """Return a file whose header was changed, with the right checksum."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    del metadata["crc32"]
    changed = change(metadata, header, bytearray(data))
    data = changed if isinstance(changed, bytearray) else data
    crc = zlib.crc32(json.dumps([metadata, header], sort_keys=True).encode())
    metadata["crc32"] = f"{zlib.crc32(data, crc):08x}"
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_lengths(*lengths):
    def change(metadata, header, data):
        metadata["lengths"] = json.dumps(lengths)
        data[: 8 * len(lengths)] = np.array(lengths, np.int64).tobytes()
        return data

    return change


def resized(metadata, header, data):
    header[bindings.PAST_LENGTH]["shape"] = [2**40]
    header[bindings.PAST_LENGTH]["data_offsets"] = [0, 2**43]


FORGED = {
    "negative": with_lengths(-1, 3, 17),
    "beyond every position": with_lengths(2**62, 3, 17),
    "cut short": lambda m, h, d: d[:-256],
    "huge": resized,
    "unread outside": lambda m, h, d: m.update(unread="[61]"),
    "unread of no kind": lambda m, h, d: m.update(unread='{"a": 1}'),
    "a later version": lambda m, h, d: m.update(format_version="2"),
    "no id": lambda m, h, d: m.pop("state_id"),
    "another type": lambda m, h, d: h["past_key_values.0.key"].update(dtype="U16"),
    "an unknown type": lambda m, h, d: h["past_key_values.0.key"].update(dtype="F64"),
    "another name": lambda m, h, d: h.update(more=h.pop("past_key_values.1.value")),
    "another shape": lambda m, h, d: h["past_key_values.0.key"]["shape"].reverse(),
    "lengths that differ": lambda m, h, d: m.update(lengths="[40, 3, 16]"),
    "a text for a shape": lambda m, h, d: h["past_key_values.0.key"].update(shape="abcd"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_is_refused_with_a_right_checksum_too(graph, tmp_path, name):
    path = tmp_path / "s"
    begun(graph).save(path)
    content = path.read_bytes()
    path.write_bytes(rewritten(content, lambda *_: None))
    graph.load_state(path)
    path.write_bytes(rewritten(content, FORGED[name]))
    with pytest.raises(SessionError):
        graph.load_state(path)


def test_every_flipped_bit_and_every_cut_is_noticed(graph, tmp_path):
    path = tmp_path / "s"
    begun(graph, [2]).save(path, unread=[3])
    content = path.read_bytes()
    dice = random.Random(0)
    places = [*range(64), *dice.sample(range(64, len(content)), 700)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        accepted(graph, path, content)
    for size in [*range(20), *dice.sample(range(len(content)), 300)]:
        path.write_bytes(content[:size])
        with pytest.raises(SessionError):
            graph.load_state(path)
    path.write_bytes(content + b"0")
    with pytest.raises(SessionError):
        graph.load_state(path)


@pytest.mark.slow
def test_thousands_of_damaged_files_are_refused_in_one_line(graph, tmp_path):
    path = tmp_path / "s"
    begun(graph, [5, 2]).save(path)
    content = path.read_bytes()
    dice = random.Random(3)
    refused = 0
    for index in range(3000):
        path.write_bytes((mutate_bytes, mutate_safetensors)[index % 2](content, dice))
        refused += not accepted(graph, path, content)
    assert refused > 2500


def accepted(lm, path, content):
    """Whether a file is taken, which one may be that differs in spaces of the header alone."""
    try:
        found = lm.load_snapshot(path)
    except LminfError:
        return False
    path.write_bytes(content)
    wanted = lm.load_snapshot(path)
    assert found.unread == wanted.unread
    for name, array in wanted.to_arrays().items():
        np.testing.assert_array_equal(found.to_arrays()[name], array)
    return True


BY_HAND = {
    "cut short": lambda s: {n: a[:, :, :9] for n, a in s.caches.items()},
    "too long": lambda s: {n: np.concatenate([a, a, a], axis=2) for n, a in s.caches.items()},
    "another type": lambda s: {n: a.astype(np.float64) for n, a in s.caches.items()},
    "another byte order": lambda s: {n: a.astype(">f4") for n, a in s.caches.items()},
    "fewer dimensions": lambda s: {n: a[0] for n, a in s.caches.items()},
    "none": lambda s: {},
}
LENGTHS_BY_HAND = {
    "negative": [-1, 3, 17],
    "huge": [2**60, 3, 17],
    "mis-shaped": [[40, 3, 17]],
    "floats": [40.0, 3.0, 17.0],
    "fewer": [40, 3],
    "longer than the rings": [40, 3, 17, 1],
}


@pytest.mark.parametrize("name", [*BY_HAND, *LENGTHS_BY_HAND])
def test_a_snapshot_made_by_hand_is_checked_and_changes_nothing(lm, name):
    state = begun(lm)
    saved = state.snapshot()
    lengths = np.array(LENGTHS_BY_HAND.get(name, LENGTHS))
    caches = BY_HAND[name](saved) if name in BY_HAND else saved.caches
    with pytest.raises(SessionError):
        state.restore(Snapshot(saved.contract, lengths, caches))
    np.testing.assert_array_equal(logits_after(lm, state), logits_after(lm, begun(lm)))


def test_what_is_no_snapshot_is_refused(graph):
    state = begun(graph)
    saved = state.snapshot()
    for wrong in (None, 5, "s", saved.to_arrays()):
        with pytest.raises(InputError):
            state.restore(wrong)
    for arguments in (([1], saved.caches), (saved.past_length, {"a": [1]}), (None, None)):
        with pytest.raises(InputError):
            Snapshot(saved.contract, *arguments)
    for rows in ([3], [-1], [], [[0]], ["a"], 5, None):
        with pytest.raises(InputError):
            saved.rows(rows)
    for unread in (5, [61], [-1], [[1]], ["a"], [10**400]):
        with pytest.raises(InputError):
            replace(saved, unread=unread)
    with pytest.raises(SessionError, match="does not know its bundle"):
        Snapshot(saved.contract, saved.past_length, saved.caches).save("s")
