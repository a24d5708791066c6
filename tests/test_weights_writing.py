"""Writing weights: copied or converted, during or after tracing, the file is the same."""

from __future__ import annotations

import errno
import hashlib
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from lminf_export.checkpoint.conversion import Joined, Stacked
from lminf_export.errors import ExportError, ModelError
from lminf_export.export import background_weights, run
from lminf_export.tensors import page_cache, writing
from lminf_export.tensors.dtypes import MODEL_DTYPES
from lminf_export.tensors.files import read_header
from lminf_export.tensors.pieces import Converted, all_finite
from lminf_export.tensors.stored import BLOCK_BYTES
from lminf_export.tensors.torch_dtypes import torch_dtype
from lminf_export.tensors.writing import Stopped, write_pieces
from tests.support.tiny_models import save_llama

SETTINGS = {"window_size": 23, "num_sink_tokens": 3, "chunk_size": 7}


@pytest.fixture
def stored(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.float16)
        for name, shape in {"a": (37, 19), "b": (11, 19), "c": (11, 19), "d": (1,)}.items()
    }
    save_file(tensors, tmp_path / "source.safetensors")
    return tensors, read_header(tmp_path / "source.safetensors")


@pytest.mark.parametrize("system", ["copies", "refuses", "copies little at a time"])
def test_what_is_not_converted_is_copied_with_whatever_the_system_has(
    system, stored, tmp_path, monkeypatch
):
    tensors, source = stored
    real = getattr(os, "copy_file_range", None)
    if system == "refuses":

        def refuse(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    elif system == "copies little at a time":
        if real is None:
            pytest.skip("this system has no copy_file_range")
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, o: real(a, b, min(n, 101), o))
    pieces = [
        Converted("wide", source["a"], "float32"),
        Converted("a", source["a"], "float16"),
        Converted("stack", Stacked((source["b"], source["c"])), "float16"),
        Converted("joined", Joined((source["a"], source["c"]), 0), "float16"),
        Converted("beside", Joined((source["b"], source["c"]), 1), "float16"),
        Converted("d", source["d"], "float16"),
    ]
    told = []
    path = tmp_path / "out.safetensors"
    _, digest = write_pieces(path, pieces, told.append)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert sum(told) == sum(tensor.nbytes for tensor in found.values())
    for name, wanted in {
        "wide": tensors["a"].float(),
        "a": tensors["a"],
        "stack": torch.stack([tensors["b"], tensors["c"]]),
        "joined": torch.cat([tensors["a"], tensors["c"]]),
        "beside": torch.cat([tensors["b"], tensors["c"]], 1),
        "d": tensors["d"],
    }.items():
        assert torch.equal(found[name], wanted), name


KINDS = {name: torch_dtype(name) for name in MODEL_DTYPES}


@pytest.mark.parametrize("stored_as", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
def test_conversion_rounds_as_torch_does_across_blocks(stored_as, wanted, tmp_path):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3 * BLOCK_BYTES // 4 + 5, generator=generator)
    values[:6] = torch.tensor([1e-7, -1e-8, 0.0, -0.0, float("inf"), float("nan")])
    values = values.to(KINDS[stored_as])
    save_file({"a": values, "none": values[:0]}, tmp_path / "source.safetensors")
    source = read_header(tmp_path / "source.safetensors")
    pieces = [Converted(name, tensor, wanted) for name, tensor in source.items()]
    path = tmp_path / "out.safetensors"
    _, digest = write_pieces(path, pieces)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = values.to(KINDS[wanted])
    found = load_file(path)["a"]
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_what_float16_cannot_hold_is_refused(tmp_path):
    values = torch.ones(BLOCK_BYTES // 2 + 9, dtype=torch.bfloat16)
    values[-1] = 70000.0
    save_file({"a": values}, tmp_path / "source.safetensors")
    (tensor,) = read_header(tmp_path / "source.safetensors").values()
    with pytest.raises(ModelError, match="65504"):
        write_pieces(tmp_path / "out", [Converted("a", tensor, "float16")])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_whatever_is_not_finite_is_found(value):
    for dtype in KINDS.values():
        for place in (0, 500, 1000):
            tensor = torch.linspace(-3, 3, 1001).to(dtype)
            assert all_finite(tensor)
            tensor[place] = value
            assert not all_finite(tensor)
    assert all_finite(torch.empty(0))


@pytest.mark.parametrize("too_large", [False, True])
def test_ranges_and_syncs_smaller_than_the_file_change_nothing(
    too_large, stored, tmp_path, monkeypatch
):
    _, source = stored
    monkeypatch.setattr(page_cache, "is_too_large", lambda _: too_large)
    monkeypatch.setattr(writing, "RANGE_BYTES", 97)
    monkeypatch.setattr(writing, "_SYNC_BYTES", 211)
    path = tmp_path / "out.safetensors"
    pieces = [Converted(name, tensor, "float16") for name, tensor in source.items()]
    _, digest = write_pieces(path, pieces)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_checkpoint_cut_while_it_is_read_is_one_line(stored, tmp_path):
    _, source = stored
    os.truncate(tmp_path / "source.safetensors", source["d"].offset)
    with pytest.raises(ModelError, match=r"source\.safetensors was cut"):
        write_pieces(tmp_path / "out.safetensors", [Converted("d", source["d"], "float16")])


def test_writing_can_be_called_off(stored, tmp_path):
    _, source = stored
    before = set(threading.enumerate())
    pieces = [Converted(name, tensor, "float16") for name, tensor in source.items()]
    with pytest.raises(Stopped):
        write_pieces(tmp_path / "out.safetensors", pieces, stopped=lambda: True)
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("m") / "llama")


@pytest.mark.slow
def test_weights_are_written_while_the_model_is_traced(llama, tmp_path, monkeypatch):
    """Tracing waits for them here, which would take for ever if they came after it."""
    started, real_write, real_trace = threading.Event(), write_pieces, run.trace

    def write(*arguments):
        started.set()
        return real_write(*arguments)

    def trace(*arguments, **settings):
        assert started.wait(60)
        return real_trace(*arguments, **settings)

    monkeypatch.setattr(background_weights, "write_pieces", write)
    monkeypatch.setattr(run, "trace", trace)
    run.export(llama, tmp_path / "b", **SETTINGS)


@pytest.mark.slow
def test_a_wrong_prediction_of_the_weights_costs_time_only(llama, tmp_path, monkeypatch):
    right = run.export(llama, tmp_path / "right", **SETTINGS)
    real = run.expected_pieces
    monkeypatch.setattr(run, "expected_pieces", lambda *a: real(*a)[:-1])
    wrong = run.export(llama, tmp_path / "wrong", **SETTINGS)
    (name,) = right.manifest.files_of("weights")
    first, second = load_file(right.path / name), load_file(wrong.path / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_fails_meanwhile_stops_the_writing_and_leaves_nothing(llama, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ExportError("torch could not translate this model")

    before = set(threading.enumerate())
    monkeypatch.setattr(run, "trace", fail)
    with pytest.raises(ExportError, match="could not translate"):
        run.export(llama, tmp_path / "b", **SETTINGS)
    assert not list(tmp_path.iterdir())
    assert set(threading.enumerate()) <= before
