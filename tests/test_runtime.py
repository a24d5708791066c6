"""The runtime: any split of a stream into chunks and batches gives the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lminf_export
from lminf_export.bundle.files import file_sha256
from lminf_export.bundle.manifest import content_sha256
from lminf_export.errors import BundleError, InputError, SessionError
from lminf_export.runtime import onnxruntime as runtime_onnxruntime
from lminf_export.runtime.cache import grown_capacity
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(sliding_window=5)
LENGTH = 90  # more than four laps of the larger ring
# float32 sums of a few dozen terms in another order; logits reach about 70.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    # The reference is the function body: only it is equal bit for bit. Kernels: test_kernels.py.
    path = TINY.write(tmp_path_factory.mktemp("b") / "tiny").path
    return load(path, threads=1, kernels="none")


@pytest.fixture(scope="module")
def streams():
    return np.random.default_rng(7).integers(0, TINY.vocab_size, (3, LENGTH))


@pytest.fixture(scope="module")
def wanted(streams):
    return np.stack([TINY.reference_logits(row) for row in streams])


def in_pieces(lm, ids, sizes, state=None):
    state = state or lm.new_state(len(ids))
    parts, start = [], 0
    for size in sizes:
        parts.append(lm.forward(ids[:, start : start + size], state))
        start += size
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [LENGTH], [7] * 12 + [6], [1, 2, 3, 5, 8, 13, 21, 34, 3]]
)
def test_any_chunks_give_the_logits_of_single_tokens_with_full_rings(lm, streams, wanted, sizes):
    found = in_pieces(lm, streams, sizes)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ragged_chunks_give_the_logits_of_separate_streams(lm, streams, wanted, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    state, place = lm.new_state(3), np.zeros(3, np.int64)
    while place.min() < LENGTH:
        width = int(rng.integers(1, 23))
        lengths = np.minimum(rng.integers(0, width + 1, 3), LENGTH - place)
        ids = rng.integers(-5, 10**6, (3, width))  # padding may be anything
        for row, count in enumerate(lengths):
            ids[row, :count] = streams[row, place[row] : place[row] + count]
        mode = data.draw(st.sampled_from(["all", "last", "none"]))
        found = lm.forward(ids, state, lengths=lengths, logits=mode)
        for row, count in enumerate(lengths):
            expected = wanted[row, place[row] : place[row] + count]
            if mode == "all":
                assert np.abs(found[row, :count] - expected).max(initial=0) < TOLERANCE
                assert not found[row, count:].any()
            elif mode == "last" and count:
                assert np.abs(found[row, 0] - expected[-1]).max() < TOLERANCE
            elif mode == "last":
                assert not found[row].any()
            else:
                assert found is None
        place += lengths
        assert (state.past_length == place).all()


def test_shared_buffers_give_the_logits_of_separate_ones_bit_for_bit(lm, streams, wanted):
    """Sinks too: their write is an element-wise choice between old and new."""
    state = lm.new_state()
    state._reserve(max(state.capacities))  # full rings from the start, as the reference has
    assert (in_pieces(lm, streams[:1], [1] * LENGTH, state) == wanted[:1]).all()


def test_past_and_present_are_one_buffer(lm, streams):
    state = lm.new_state()
    lm.forward(streams[:1, :30], state, logits="last")
    lm.forward(streams[:1, 30:31], state, logits="last")
    call = state._bound.calls[1, 1]
    present = call.binding.get_outputs()
    names = [row.name for row in lm.bundle.manifest.outputs]
    for cache in state._bound.caches:
        value = present[names.index(cache.present)]
        assert value.data_ptr() == cache.value.data_ptr() == cache.array.ctypes.data


@pytest.mark.slow
def test_onnxruntime_copies_no_cache():
    """It warns when a write could not happen in place; a run at its usual log level is silent."""
    code = textwrap.dedent(
        """
        import tempfile, pathlib, numpy as np
        from lminf_export.runtime import load as _, onnxruntime as ort_session
        ort_session._LOG_FATAL = 2
        from lminf_export import load
        from tests.support.tiny_bundle import TinyModel
        with tempfile.TemporaryDirectory() as folder:
            lm = load(TinyModel().write(pathlib.Path(folder) / "b").path, threads=1)
            state = lm.new_state(2)
            for width in (20, 1, 1, 5, 1):
                lm.forward(np.ones((2, width), int), state)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "in-place" not in done.stderr


def test_a_ring_grows_as_needed_up_to_its_full_size(lm):
    tiny = TINY.layers
    state = lm.new_state(2)
    sizes = []
    for _ in range(30):
        lm.forward(np.ones((2, 1), int), state, logits="none")
        sizes.append(state.nbytes)
    assert sizes == sorted(sizes)
    assert sizes[-1] == state.max_nbytes
    slots = tiny[0].ring_capacity + TINY.num_sink_tokens + tiny[1].ring_capacity
    assert state.max_nbytes == 2 * 2 * TINY.num_kv_heads * TINY.head_dim * slots * 4
    assert lm.session.snapshot(state).nbytes == state.nbytes


@settings(max_examples=300, deadline=None)
@given(
    full=st.integers(1, 5000),
    steps=st.lists(st.integers(1, 700), min_size=1, max_size=40),
)
def test_a_grown_ring_always_holds_every_position_or_is_full(full, steps):
    bound = past = copies = 0
    for step in steps:
        grown = grown_capacity(bound, full, past + step)
        assert bound <= grown <= full
        assert grown == full or past + step <= grown
        copies += grown != bound
        bound, past = grown, past + step
    assert copies <= 30


def test_states_of_one_session_are_independent(lm, streams, wanted):
    states = [lm.new_state(), lm.new_state(), lm.new_state(2)]
    parts = [[], [], []]
    for start in range(0, LENGTH, 6):
        parts[0].append(lm.forward(streams[:1, start : start + 6], states[0]))
        for offset in range(6):
            piece = streams[1:2, start + offset : start + offset + 1]
            parts[1].append(lm.forward(piece, states[1]))
        parts[2].append(lm.forward(streams[1:, start : start + 6], states[2]))
    for part, expected in zip(parts, (wanted[:1], wanted[1:2], wanted[1:]), strict=True):
        assert np.abs(np.concatenate(part, axis=1) - expected).max() < TOLERANCE


def test_returned_logits_and_past_length_are_the_callers_own(lm, streams):
    state = lm.new_state()
    first = lm.forward(streams[:1, :1], state)
    copy = first.copy()
    lm.forward(streams[:1, 1:2], state)
    assert (first == copy).all()
    state.past_length[:] = 0
    assert state.past_length == 2


def test_torch_tensors_and_lists_are_token_ids_too(lm):
    import torch

    a = lm.forward([[5, 6]], lm.new_state())
    b = lm.forward(torch.tensor([[5, 6]]), lm.new_state())
    c = lm.forward(np.array([[5, 6]], np.uint8), lm.new_state())
    assert (a == b).all()
    assert (a == c).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 6], r"shape \(2,\); expected \(1, S\)"),
        ([[5], [6]], r"shape \(2, 1\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[1, 2], [3]], "rows of different lengths"),
        ([[1.0]], "has type float64"),
        ([[True]], "has type bool"),
        ([["a"]], "has type <U1"),
        ([[10**30]], "has type object"),
        ([[-1]], "token id -1 is outside the vocabulary of 257"),
        ([[257]], r"token id 257 .*\(0 … 256\)"),
        ([[0] * 50 + [300]], "token id 300"),
        (np.array([[2**63]], np.uint64), "token id 9223372036854775808"),
    ],
)
def test_wrong_token_ids_are_refused_and_the_state_stays(lm, ids, message):
    state = lm.new_state()
    with pytest.raises(InputError, match=message):
        lm.forward(ids, state)
    assert state.past_length == 0


@pytest.mark.parametrize("lengths", [[3], [-1, 0], [0, 3], [[1, 1]], [], 2])
def test_wrong_lengths_are_refused(lm, lengths):
    with pytest.raises(InputError, match="lengths="):
        lm.forward([[1, 2], [3, 4]], lm.new_state(2), lengths=lengths)


def test_rows_without_any_token_change_nothing(lm):
    state = lm.new_state(2)
    assert not lm.forward([[1], [2]], state, lengths=[0, 0]).any()
    assert not state.past_length.any()


def test_wrong_arguments_are_refused_by_name(lm, tmp_path):
    other = load(TINY.write(tmp_path / "other").path, threads=1)
    with pytest.raises(InputError, match="not from this model"):
        lm.forward([[1]], other.new_state())
    with pytest.raises(InputError, match="not from this model"):
        lm.forward([[1]], None)
    with pytest.raises(InputError, match="logits='some'"):
        lm.forward([[1]], lm.new_state(), logits="some")
    for size in (0, -1, 1.0, True):
        with pytest.raises(InputError, match="batch_size="):
            lm.new_state(size)


def test_positions_beyond_the_exact_range_are_refused(lm):
    state = lm.new_state(2)
    state.advance(np.array([2**40 - 3, 5]))
    lm.forward([[1, 2], [1, 2]], state, logits="none")
    with pytest.raises(InputError, match=f"would reach token {2**40 + 1}"):
        lm.forward([[1, 2], [1, 2]], state)
    # Padding does not count.
    lm.forward([[1, 2], [1, 2]], state, lengths=[1, 2])
    with pytest.raises(InputError, match="start a new state"):
        lm.forward([[1], [1]], state)
    assert state.past_length.tolist() == [2**40, 9]


def test_logits_that_are_not_finite_are_an_error_and_do_not_count(tmp_path):
    tiny = TinyModel(nan_token=17)
    lm = load(tiny.write(tmp_path / "nan").path, threads=1)
    for chunk in ([[17]], [[1, 2, 17]], [[17] * 20]):
        state = lm.new_state()
        with pytest.raises(SessionError, match="not finite"):
            lm.forward(chunk, state)
        assert state.past_length == 0
    state = lm.new_state(2)
    with pytest.raises(SessionError, match="not finite"):
        lm.forward([[1, 2], [3, 17]], state, logits="last")
    # Nobody looks at padding.
    assert np.isfinite(lm.forward([[1, 2], [3, 17]], lm.new_state(2), lengths=[2, 1])).all()


def test_half_precision_keeps_half_precision_caches_and_float32_logits(tmp_path):
    tiny = TinyModel(dtype="float16")
    lm = load(tiny.write(tmp_path / "half").path, threads=1)
    state = lm.new_state()
    assert state.max_nbytes * 2 == TinyModel().manifest().cache_bytes_per_sequence
    ids = np.arange(40)[None]
    logits = in_pieces(lm, ids, [1, 20, 19], state)
    assert logits.dtype == np.float32
    full = TinyModel().reference_logits(ids[0])
    # float16 keeps 11 bits: 5e-4 of logits that reach 70, over a dozen products.
    assert np.abs(logits[0] - full).max() < 1.0


def test_bfloat16_says_where_it_runs(tmp_path):
    path = TinyModel(dtype="bfloat16").write(tmp_path / "bf16").path
    with pytest.raises(SessionError, match="bfloat16, which onnxruntime runs on GPUs only"):
        load(path)


def test_a_missing_provider_and_wrong_settings_are_named(lm, monkeypatch):
    path = lm.bundle.path
    monkeypatch.setattr(
        runtime_onnxruntime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"]
    )
    with pytest.raises(SessionError, match=r"no cuda provider .*install onnxruntime-gpu"):
        load(path, provider="cuda")
    with pytest.raises(SessionError, match="provider='tpu': must be one of cpu, cuda"):
        load(path, provider="tpu")
    for threads in (0, -1, True):
        with pytest.raises(SessionError, match="threads="):
            load(path, threads=threads)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_no_silent_cpu(lm, monkeypatch):
    monkeypatch.setattr(
        runtime_onnxruntime.ort,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    with pytest.raises(SessionError, match="could not start its cuda provider"):
        load(lm.bundle.path, provider="cuda")


def written_with(tmp_path, change):
    """A bundle whose graph was changed before it was sealed."""
    from lminf_export.bundle.folder import Bundle
    from lminf_export.bundle.writer import BundleWriter

    tiny = TinyModel()
    model = tiny.graph
    change(model)
    with BundleWriter(tmp_path / "changed") as writer:
        onnx.save(model, writer.add("model.onnx", "graph"))
        writer.commit(tiny.manifest())
    return Bundle.open(tmp_path / "changed")


def rename_input(model):
    model.graph.input[1].name = "past_len"
    for node in model.graph.node:
        node.input[:] = ["past_len" if x == "past_length" else x for x in node.input]


def extra_input(model):
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, ["batch"])
    )


def other_type(model):
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    model.graph.node[-1].attribute[0].i = onnx.TensorProto.DOUBLE


def fixed_ring(model):
    model.graph.input[4].type.tensor_type.shape.dim[2].dim_value = 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_input, r"inputs 1 is past_len int64\[batch\], the manifest says past_length"),
        (extra_input, r"inputs 12 is mask float32\[batch\], the manifest has none"),
        (other_type, r"outputs 0 is logits float64\[batch, .*, the manifest says logits float32"),
        (fixed_ring, r"inputs 4 is past_key_values\.0\.key"),
    ],
)
def test_a_graph_that_is_not_the_manifests_is_refused(tmp_path, change, message):
    with pytest.raises(SessionError, match=message):
        OnnxRuntimeSession(written_with(tmp_path, change))


def test_a_graph_that_does_not_load_is_one_line(tmp_path):
    def damage(model):
        model.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(SessionError, match="onnxruntime cannot load") as caught:
        OnnxRuntimeSession(written_with(tmp_path, damage))
    assert "\n" not in str(caught.value)


def test_a_failing_step_is_one_line_and_does_not_count(lm, monkeypatch):
    state = lm.new_state()

    def fail(_):
        raise RuntimeError("first\nsecond")

    state.session = SimpleNamespace(run_with_iobinding=fail, io_binding=state.session.io_binding)
    monkeypatch.setattr(lm.session, "owns", lambda _: True)
    with pytest.raises(SessionError, match="the step at token 0 failed: first second"):
        lm.forward([[1]], state)
    assert state.past_length == 0


def test_a_cache_larger_than_this_machine_is_refused_with_both_numbers(tmp_path):
    tiny = TinyModel(window_size=2**39, chunk_size=1)
    path = tiny.write(tmp_path / "huge").path
    with pytest.raises(SessionError, match=r"take 1.* PiB|take .*TiB when full, .* has .*GiB free"):
        load(path)


def test_a_batch_larger_than_this_machine_is_refused_with_both_numbers(lm, monkeypatch):
    need = lm.bundle.manifest.cache_bytes_per_sequence
    memory = SimpleNamespace(available=2 * need, total=4 * need)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    lm.new_state(2)
    with pytest.raises(SessionError, match=r"caches of 3 streams take .* KiB .*smaller batch"):
        lm.new_state(3)


def altered(path, old, new):
    """Change bytes of the graph, and the manifest with it, as whoever makes a bundle can."""
    graph = path / "model.onnx"
    content = graph.read_bytes()
    assert old in content
    graph.write_bytes(content.replace(old, new))
    manifest = json.loads((path / "lminf.json").read_text(encoding="utf-8"))
    manifest["files"]["model.onnx"]["sha256"] = file_sha256(graph)
    manifest["manifest_sha256"] = content_sha256(manifest)
    (path / "lminf.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"Gather", b"Gath\xe9r", r"cannot load .*Gath\\xe9r"),
        (b"input_ids", b"input_\xe9ds", r"cannot name the inputs .*input_\\xe9ds"),
        (b"model.onnx.data", b"model\xe9onnx.data", r"cannot load .*model\\xe9onnx\.data"),
    ],
)
def test_messages_and_names_that_are_not_utf8_are_one_line(
    tmp_path, monkeypatch, capfd, old, new, words
):
    monkeypatch.chdir(tmp_path)  # long paths would leave no room for the words
    path = TINY.write(Path("b")).path
    altered(path, old, new)
    with pytest.raises(SessionError, match=words) as caught:
        load(path, threads=1, kernels="none")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_path_that_is_not_utf8_is_one_line(tmp_path):
    path = TINY.write(tmp_path / "b").path
    odd = path.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(BundleError, match="is not UTF-8, which safetensors and onnxruntime need"):
        load(odd)
    with pytest.raises(BundleError, match="is not UTF-8"):
        load("a \ud800 surrogate")


def test_a_plan_that_is_not_the_bundles_is_refused(tmp_path):
    path = TINY.write(tmp_path / "b").path
    (path / "other.plan").write_bytes(b"")
    with pytest.raises(SessionError, match="is not the plan of this bundle"):
        load(path / "other.plan")


def test_a_graph_that_is_not_the_bundles_is_refused(tmp_path):
    path = TINY.write(tmp_path / "b").path
    (path / "engine.onnx").write_bytes(b"")
    with pytest.raises(SessionError, match=r"name the bundle's folder or .*model\.onnx"):
        load(path / "engine.onnx")
    assert load(path / "model.onnx")


def test_running_a_bundle_imports_neither_torch_nor_transformers_nor_onnx(lm):
    code = textwrap.dedent(
        f"""
        import sys
        import lminf_export
        early = set(sys.modules) & {{"numpy", "pydantic", "onnxruntime"}}
        assert not early, early
        lm = lminf_export.load({str(lm.bundle.path)!r}, threads=1)
        list(lm.generate(lm.codec.encode("Hi"), max_new_tokens=3))
        import lminf_export.cli.main, lminf_export.cli.generate
        wrong = set(sys.modules) & {{"torch", "transformers", "onnx", "onnxscript", "rich"}}
        assert not wrong, wrong
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    assert set(lminf_export.__all__) <= set(dir(lminf_export))
    for name in set(lminf_export.__all__) - {"export"}:
        assert getattr(lminf_export, name) is not None
    assert lminf_export.LanguageModel is LanguageModel
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lminf_export.nothing


@pytest.mark.slow
def test_memory_stays_flat_over_many_steps(lm):
    state = lm.new_state()
    lm.forward(np.ones((1, 200), int), state, logits="none")

    def steps(count):
        for index in range(count):
            lm.forward([[index % 257]], state, logits="last")
        return psutil.Process().memory_info().rss

    held = [steps(5000), *(steps(10_000) for _ in range(3))]
    growth = [after - before for before, after in pairwise(held)]
    # Under 50 bytes a step; one kept array or binding is more, and grows in every round, while the
    # allocator of a process that has run other tests may take a megabyte once.
    assert min(growth) < 500_000, growth
