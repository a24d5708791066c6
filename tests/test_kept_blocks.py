"""Blocks of GGUF files that a quantised bundle keeps: their values, bytes, graph and reports."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from benchmarks.support.gguf_files import save_gguf
from lminf_export import load
from lminf_export.bundle.records import TensorBlocks
from lminf_export.cli.export import export_command
from lminf_export.cli.validate import validate_command
from lminf_export.export.options import ExportOptions
from lminf_export.export.run import prepare, run_job
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.quantize.formats import dequantize_rows
from lminf_export.quantize.kept import KEPT_TYPES, kept_blocks, kept_type
from lminf_export.quantize.reading import dequantize_stored
from lminf_export.quantize.stored import kept_piece
from lminf_export.tensors.gguf_blocks import block_sizes
from lminf_export.tensors.stored import StoredTensor
from lminf_export.tensors.writing import write_pieces
from lminf_export.verify.weights_comparison import _is_made_of
from tests.support.gguf_matrices import matrices, random_blocks
from tests.support.tiny_models import save_llama

SETTINGS = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 7}


@pytest.mark.parametrize("name", KEPT_TYPES)
def test_kept_blocks_have_the_values_of_the_file(name):
    kind, rng = KEPT_TYPES[name], np.random.default_rng(0)
    assert (kind.elements, kind.num_bytes) == next(
        tuple(rest) for known, *rest in block_sizes().values() if known == name
    )
    rows = random_blocks(name, rng, 7, 512)
    blocks = kept_blocks(rows, kind)
    form = kind.form(7, 512)
    assert (blocks.packed.shape, blocks.scales.shape) == (form.packed_shape, form.scales_shape)
    assert (blocks.offsets is not None) == kind.offsets
    wanted = gguf.dequantize(rows, Kind[name])
    # One rounding of the two terms whose sum a weight with an offset is.
    slack = 0 if blocks.offsets is None else np.abs(blocks.offsets).max() * 2.0**-23
    assert np.abs(dequantize_rows(blocks, form) - wanted).max() <= slack
    if kind.scales == "float16":
        assert np.array_equal(blocks.scales.astype(np.float16), blocks.scales)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q2_K", "Q4_1", "Q5_1"])
def test_a_block_without_a_scale_keeps_its_minimum(name):
    kind, rows = KEPT_TYPES[name], random_blocks(name, np.random.default_rng(1), 2, 256)
    scale = 80 if name == "Q2_K" else 0
    rows.reshape(2, -1, kind.num_bytes)[:, :, scale : scale + 2] = 0
    wanted = gguf.dequantize(rows, Kind[name])
    assert np.array_equal(dequantize_rows(kept_blocks(rows, kind), kind.form(2, 256)), wanted)
    assert wanted.any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q5_1"])
def test_what_is_written_is_read_back(name, dtype, tmp_path):
    tensor = matrices(tmp_path / "m.gguf", {"w": (name, 5, 512)})["w"]
    kind = kept_type(tensor)
    assert kind is not None
    piece = kept_piece("w", tensor, kind, dtype, signed=False)
    stored, _ = write_pieces(tmp_path / "w.safetensors", [piece])
    sizes = {"w": (kind.bits, kind.block_size)}
    (found,) = dequantize_stored(stored, {"w": (5, 512)}, sizes, 128, signed=False).values()
    values, wanted = torch.cat(list(found.blocks())), torch.cat(list(tensor.blocks()))
    limit = 2e-3 if dtype == "float16" else 2e-6
    assert (values - wanted).abs().max() <= limit * wanted.abs().max()
    assert isinstance(stored["w.scales"], StoredTensor)


def job_of(model, out, kinds, path, **options):
    """An export whose projections come in blocks of GGUF types."""
    job = prepare(ExportOptions(model, out, **SETTINGS, **options))
    names = [n for n in job.checkpoint.tensors if n.endswith("proj.weight") or "embed" in n]
    shapes = {name: job.checkpoint.tensors[name].shape for name in names}
    chosen = {n: (kinds[i % len(kinds)], *shapes[n]) for i, n in enumerate(sorted(names))}
    tensors = {**job.checkpoint.tensors, **matrices(path, chosen)}
    return replace(job, checkpoint=replace(job.checkpoint, tensors=tensors, is_computed=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    return save_llama(tmp_path_factory.mktemp("kept") / "m", **sizes, **heads)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (("Q4_K", "Q6_K", "Q5_1", "Q4_0", "Q3_K"), {}),
        (tuple(KEPT_TYPES), {"quantize": QuantizeConfig("int4", accuracy_level=1)}),
        (("Q5_K", "Q2_K", "Q8_0", "MXFP4"), {"dtype": "float16"}),
        (("Q4_1",), {"quantize": "int8"}),
    ],
)
def test_a_bundle_keeps_the_values_and_computes_with_them(kinds, options, model, tmp_path):
    job = job_of(
        model, tmp_path / "b", kinds, tmp_path / "m.gguf", **{"quantize": "int4"} | options
    )
    expected = job.weight_bytes
    bundle = run_job(job)
    assert abs(bundle.manifest.files["weights.safetensors"].bytes / expected - 1) < 0.05
    record = bundle.manifest.quantization
    assert {blocks.source_type for blocks in record.tensors.values()} <= set(kinds)
    assert len(record.kept) == len(record.tensors) == 15
    assert any("15 weights keep the values of the GGUF file" in n for n in bundle.manifest.notices)
    result = CliRunner().invoke(validate_command, [str(bundle.path), "--json"])
    assert result.exit_code == 0, result.output
    comparison = json.loads(result.stdout)["comparisons"][0]
    if record.accuracy_level == 1:
        assert comparison["tolerance"] == 2e-5


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0", "Q6_K"])
def test_a_file_is_exported_runs_and_is_what_it_was(kind, model, tmp_path):
    file, out = save_gguf(model, tmp_path / "m.gguf", kind), tmp_path / "b"
    words = ["--model", file, "--out", out, "--quantize", "int4", "--window-size", 19]
    result = CliRunner().invoke(export_command, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert f"weights keep the values of the GGUF file (15 {kind})" in result.stderr
    loaded = load(out)
    assert loaded.forward(np.array([[3, 5, 7]]), loaded.new_state()).shape == (1, 3, 131)
    checked = CliRunner().invoke(validate_command, [str(out), "--model", str(file), "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["differing_weights"] == []


@pytest.mark.slow
def test_bodies_compute_what_kernels_do(model, tmp_path):
    kinds = ("Q4_K", "Q6_K", "Q5_1", "Q4_0", "Q3_K", "Q8_0")
    config = QuantizeConfig("int4", accuracy_level=1)
    bundle = run_job(job_of(model, tmp_path / "b", kinds, tmp_path / "m.gguf", quantize=config))
    ids = np.random.default_rng(0).integers(0, 131, (1, 40))
    found = []
    for kernels in ("auto", "none"):
        loaded = load(bundle.path, kernels=kernels)
        found.append(loaded.forward(ids, loaded.new_state())[0])
    assert np.abs(found[0] - found[1]).max() < 2e-5 * np.ptp(found[1])


@pytest.mark.slow
def test_on_request_blocks_are_requantised(model, tmp_path):
    config = QuantizeConfig("int4", source_blocks="requantize")
    job = job_of(model, tmp_path / "b", ("Q6_K", "Q4_0"), tmp_path / "m.gguf", quantize=config)
    bundle = run_job(job)
    assert not bundle.manifest.quantization.kept
    assert any("15 are requantised (7 Q4_0, 8 Q6_K)" in n for n in bundle.manifest.notices)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_engines_keep_symmetric_blocks_of_4_bits(kind, model, tmp_path):
    config = QuantizeConfig("int4", form="qdq")
    job = job_of(model, tmp_path / "b", (kind,), tmp_path / "m.gguf", quantize=config)
    bundle = run_job(job)
    assert len(bundle.manifest.quantization.kept) == (14 if kind == "Q4_0" else 0)
    stored = load_file(bundle.path / "weights.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight.quantized"].shape == (256, 128)


def test_bytes_are_compared_with_those_of_the_source(model, tmp_path):
    tensors = matrices(tmp_path / "m.gguf", {"w": ("Q4_K", 5, 256), "v": ("Q4_K", 5, 256)})
    kind = KEPT_TYPES["Q4_K"]
    piece = kept_piece("w", tensors["w"], kind, "float32", signed=False)
    stored, _ = write_pieces(tmp_path / "w.safetensors", [piece])
    (weight,) = dequantize_stored(
        stored, {"w": (5, 256)}, {"w": (4, 32)}, 32, signed=False
    ).values()
    blocks = TensorBlocks(bits=4, block_size=32, method="keep", source_type="Q4_K")
    assert _is_made_of("w", weight, tensors["w"], "float32", blocks)
    assert not _is_made_of("w", weight, tensors["v"], "float32", blocks)
