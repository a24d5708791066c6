"""Sessions of engines with the plugin, driven by doubles (tests/tensorrt_doubles.py).

No GPU has run this yet. The engine's double computes what the operator's body computes, which
is what the plugin must compute (test_plugin_harness.py).
"""

from __future__ import annotations

import numpy as np
import pytest

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import BundleError, SessionError
from lminf_export.runtime.language_model import LanguageModel
from tests.support.tensorrt_doubles import TINY, Setup, bundle_with_plan
from tests.support.tiny_bundle import TinyModel

LENGTH = 90  # more than four laps of the larger ring
TOLERANCE = 1e-4  # as in test_runtime: float32 sums of a few dozen terms in another order


@pytest.fixture
def setup(tmp_path, monkeypatch):
    return Setup(tmp_path, monkeypatch, plugin="beside")


@pytest.fixture(scope="module")
def streams():
    return np.random.default_rng(7).integers(0, TINY.vocab_size, (3, LENGTH))


@pytest.fixture(scope="module")
def wanted(streams):
    return np.stack([TINY.reference_logits(row) for row in streams])


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [LENGTH], [2, 1, 1, 5, 1, 13, 1, 21, 34, 1, 1, 9]])
def test_any_chunks_give_the_logits_of_single_tokens(setup, streams, wanted, sizes, cuda_graphs):
    lm = LanguageModel(setup.bundle, setup.open(cuda_graphs=cuda_graphs))
    state = lm.new_state(3)
    parts, start = [], 0
    for size in sizes:
        parts.append(lm.forward(streams[:, start : start + size], state).copy())
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=TOLERANCE, rtol=0)
    singles = sizes.count(1)
    assert setup.cudart._launches == (max(singles - 1, 0) if cuda_graphs else 0)


def test_rows_of_different_lengths_keep_their_streams_apart(setup, streams, wanted):
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(3)
    random = np.random.default_rng(11)
    done = np.zeros(3, int)
    while (done < LENGTH - 7).any():
        width = int(random.choice([1, 7]))
        lengths = np.minimum(random.integers(0, width + 1, 3), LENGTH - 7 - done)
        if not lengths.any():
            continue
        rows = np.stack([streams[row, done[row] : done[row] + width] for row in range(3)])
        found = lm.forward(rows, state, lengths=lengths)
        for row, length in enumerate(lengths):
            span = slice(done[row], done[row] + length)
            np.testing.assert_allclose(
                found[row, :length], wanted[row, span], atol=TOLERANCE, rtol=0
            )
        done += lengths
    assert setup.cudart._launches > 5


def test_a_chunk_may_cross_a_rings_end(setup):
    session = setup.open()
    state = session.new_state(2)
    for past in ([0, 0], [1, 0], [13, 20], [20, 41]):
        session.stand_at(state, np.array(past))
        assert session.step_limit(state) == TINY.chunk_size


def test_two_states_have_recordings_of_their_own_and_give_everything_back(setup, streams, wanted):
    session = setup.open()
    before = set(setup.cudart._held)
    lm = LanguageModel(setup.bundle, session)
    first, second = lm.new_state(1), lm.new_state(2)
    for step in range(9):
        for state, rows in ((first, slice(0, 1)), (second, slice(1, 3))):
            found = lm.forward(streams[rows, step : step + 1], state)
            np.testing.assert_allclose(found, wanted[rows, step : step + 1], atol=TOLERANCE, rtol=0)
    assert len(setup.cudart._graphs) == 2
    del first, second, state
    assert not setup.cudart._graphs
    assert not setup.cudart._pinned
    assert set(setup.cudart._held) == before


def test_a_model_without_sinks_decodes_from_a_recording_too(tmp_path, monkeypatch, streams):
    tiny = TinyModel(num_sink_tokens=0, chunk_size=1)
    setup = Setup(tmp_path, monkeypatch, tiny=tiny, plugin="beside")
    lm = LanguageModel(setup.bundle, setup.open())
    found = lm.forward(streams[:1, :40], lm.new_state(1))
    np.testing.assert_allclose(
        found[0], tiny.reference_logits(streams[0, :40]), atol=TOLERANCE, rtol=0
    )
    assert setup.cudart._launches == 39


def test_an_engine_that_cannot_be_recorded_is_an_error_and_not_run_slower(setup, streams):
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(1)
    lm.forward(streams[:1, :1], state)
    setup.cudart._recordable = False
    with pytest.raises(
        SessionError, match=r"CUDA graph: cudaStreamEndCapture failed.*cuda_graphs=False"
    ):
        lm.forward(streams[:1, 1:2], state)
    assert state.past_length.tolist() == [1]


def test_a_failure_while_recording_names_the_engines_reason_and_frees_the_stream(setup, streams):
    lm = LanguageModel(setup.bundle, setup.open())
    state = lm.new_state(1)
    lm.forward(streams[:1, :1], state)
    setup.engine._failures.append("LambdaAttention: out of luck")
    with pytest.raises(SessionError, match=r"CUDA graph.*LambdaAttention: out of luck"):
        lm.forward(streams[:1, 1:2], state)
    assert not setup.cudart._graphs
    lm.forward(streams[:1, 1:2], state)


def test_the_manifests_library_is_loaded_before_the_plan(setup):
    setup.open()
    assert setup.registry._loaded == [str(setup.bundle.plugin_path.resolve())]


def test_an_embedded_plugin_needs_no_file_and_the_plans_code_is_allowed(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch, plugin="embedded")
    assert setup.bundle.plugin_path is None
    setup.open()
    assert not setup.registry._loaded


def test_a_library_tensorrt_does_not_take_is_named_with_its_reason(setup):
    setup.plugin_loads = False
    with pytest.raises(
        SessionError, match=r"cannot load the plugin .*liblminf_tensorrt\.so: not an ELF file;"
    ):
        setup.open()


def test_a_plugin_whose_hash_differs_is_refused_before_anything_is_loaded(tmp_path):
    bundle, _ = bundle_with_plan(tmp_path, plugin="beside")
    bundle.plugin_path.write_bytes(b"another!!")
    with pytest.raises(BundleError, match=r"liblminf_tensorrt\.so was altered"):
        Bundle.open(bundle.path)


def test_a_missing_plugin_is_named(tmp_path):
    bundle, _ = bundle_with_plan(tmp_path, plugin="beside")
    bundle.plugin_path.unlink()
    with pytest.raises(BundleError, match=r"liblminf_tensorrt\.so is missing"):
        Bundle.open(bundle.path)
