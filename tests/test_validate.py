"""`lminf validate`: it passes a right bundle, and finds a wrong one."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lminf_export import Bundle, export
from lminf_export.bundle.writer import BundleWriter
from lminf_export.cli.validate import validate_command
from tests.support.tiny_models import save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "tiny-llama")


def bundle_of(model, folder, **settings):
    return export(model, folder, window_size=19, num_sink_tokens=3, chunk_size=7, **settings)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return bundle_of(model, tmp_path_factory.mktemp("bundles") / "float32")


def run(*arguments):
    return CliRunner().invoke(validate_command, [str(a) for a in arguments])


@pytest.mark.slow
def test_a_right_bundle_passes_with_a_table(bundle):
    result = run(bundle.path)
    assert result.exit_code == 0, result.output
    for words in ("token by token", "in uneven chunks", "stock model", "argmax", "2.0e-05", "ok"):
        assert words in result.output


def test_the_report_is_there_as_json(bundle):
    result = run(bundle.path, "--json", "--tokens", 100)
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["reference_dtype"] == "float64"
    assert report["comparisons"][0]["tokens"] == 100
    assert 0 < report["comparisons"][0]["max_error"] < 2e-5
    assert report["comparisons"][0]["argmax_agreement"] == 1.0


@pytest.mark.slow
def test_float16_is_held_to_twice_the_error_of_torch(model, tmp_path):
    result = run(bundle_of(model, tmp_path / "b", dtype="float16").path, "--json")
    assert result.exit_code == 0, result.output
    assert 2e-5 < json.loads(result.stdout)["comparisons"][0]["tolerance"] < 2e-2


@pytest.mark.slow
def test_bfloat16_says_where_it_runs(model, tmp_path):
    result = run(bundle_of(model, tmp_path / "b", dtype="bfloat16").path)
    assert result.exit_code == 2
    assert "bfloat16" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_other_weights_than_the_model_s_are_found(model, bundle, tmp_path):
    with BundleWriter(tmp_path / "changed") as writer:
        for name, entry in bundle.manifest.files.items():
            writer.add(name, entry.role).write_bytes((bundle.path / name).read_bytes())
        path = writer.add("model.safetensors", "weights")
        tensors = load_file(path)
        tensors["model.layers.2.mlp.down_proj.weight"][1, 2] += 0.5
        # The same order and sizes: the graph's offsets still hold.
        order = sorted(tensors, key=lambda n: _offset(bundle.path / "model.safetensors", n))
        save_in_order(tensors, order, bundle.path / "model.safetensors", path)
        writer.commit(bundle.manifest.model_copy(update={"files": {}, "manifest_sha256": ""}))
    changed = Bundle.open(tmp_path / "changed", verify="full")
    assert run(changed.path).exit_code == 0, "by itself it is a right bundle of other weights"
    result = run(changed.path, "--model", model)
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "model.layers.2.mlp.down_proj.weight" in result.output


@pytest.mark.slow
def test_a_weight_no_token_shows_is_found_too(model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][77, 0] += 0.01  # one element of one token's row
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    bundle = bundle_of(other, tmp_path / "b", dtype="float16")
    assert run(bundle.path, "--model", other).exit_code == 0
    result = run(bundle.path, "--model", model)
    assert result.exit_code == 1
    assert "model.embed_tokens.weight" in result.output


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_model_to_compare_with_is_refused(content, model, bundle, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    result = run(bundle.path, "--model", tmp_path / "m")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def _header(path):
    raw = path.read_bytes()
    count = int.from_bytes(raw[:8], "little")
    return raw, count, json.loads(raw[8 : 8 + count])


def _offset(path, name):
    return _header(path)[2][name]["data_offsets"][0]


def save_in_order(tensors, order, original, path):
    raw, count, _ = _header(original)
    data = b"".join(tensors[name].numpy().tobytes() for name in order)
    path.write_bytes(raw[: 8 + count] + data)


@pytest.mark.parametrize(
    ("tokens", "note"),
    [
        (1, "the stream of 1 tokens stays inside the window of 19"),
        (19, "the stream of 19 tokens stays inside the window of 19"),
        (28, "the stream of 28 tokens wraps no ring of 28 slots"),
        (29, None),
    ],
)
def test_a_stream_of_any_length_is_compared_and_a_short_one_named(bundle, tokens, note):
    result = run(bundle.path, "--tokens", tokens)
    assert result.exit_code == 0, result.output
    assert ("note: " in result.output) == (note is not None)
    assert (note or "") in result.output


def test_no_stream_is_refused(bundle):
    result = run(bundle.path, "--tokens", 0)
    assert result.exit_code == 2
    assert "tokens=0: must be at least 1" in result.stderr


def test_another_model_is_refused(bundle, tmp_path):
    for change, word in (({"num_hidden_layers": 2}, "layers"), ({"vocab_size": 140}, "vocabulary")):
        other = save_llama(tmp_path / word, **change)
        result = run(bundle.path, "--model", other)
        assert result.exit_code == 2
        assert word in result.stderr


def test_every_file_is_hashed_first(bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    size = (copy / "model.safetensors").stat().st_size
    save_file(tensors, copy / "model.safetensors")
    (copy / "model.safetensors").write_bytes(
        (copy / "model.safetensors").read_bytes()[:size].ljust(size, b"\0")
    )
    result = run(copy)
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr
