"""What is said of a rewritten bundle: its parameters, its card, and what it was compared with."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
from click.testing import CliRunner
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from transformers import AutoModelForCausalLM

import lminf_export
from lminf_export import InputError
from lminf_export.bench.floor import weight_bytes_per_step
from lminf_export.bundle.manifest import content_sha256, read_manifest
from lminf_export.cli.main import cli
from lminf_export.verify.rewritten import require_comparable
from tests.support.foreign_models import DATA, LAMBDA


def lminf(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def save_apart(model, folder, threshold):
    """Save a graph whose tensors of a size and more are in a file beside it."""
    path = folder / "model.onnx"
    path.unlink()
    onnx.save(
        model, str(path), save_as_external_data=True, location="w.data", size_threshold=threshold
    )


def int4(model):
    quantizer = MatMulNBitsQuantizer(model, block_size=16, is_symmetric=False, accuracy_level=1)
    quantizer.process()
    return quantizer.model.model


@pytest.mark.parametrize(
    ("alter", "threshold"),
    [(None, None), (None, 0), (None, 1024), (int4, None), (int4, 0)],
    ids=["in the graph", "all apart", "large ones apart", "int4 in the graph", "int4 apart"],
)
def test_parameters_and_bytes_are_the_models_wherever_they_lie(alter, threshold, foreign, tmp_path):
    source = shutil.copytree(foreign.optimum("llama"), tmp_path / "llama")
    model = onnx.load(str(source / "model.onnx"))
    model = alter(model) if alter else model
    if threshold is None:
        onnx.save(model, str(source / "model.onnx"))
    else:
        save_apart(model, source, threshold)
    bundle = lminf_export.rewrite(source, tmp_path / "b", check=False, **LAMBDA)
    checkpoint = AutoModelForCausalLM.from_pretrained(DATA / "llama" / "checkpoint")
    wanted = sum(p.numel() for p in checkpoint.parameters())
    content = json.loads(lminf("inspect", bundle.path, "--json").stdout)
    assert content["parameters"] == wanted
    table = checkpoint.get_input_embeddings().weight
    read = wanted - (table.shape[0] - 1) * table.shape[1]
    if alter is None:
        assert weight_bytes_per_step(bundle, 1) == 4 * read
    else:
        assert 0.5 * read < weight_bytes_per_step(bundle, 1) < 2 * read
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert ("| weights | in `model.onnx` |" in card) == (threshold is None)


def manifest_without(path, name):
    """Return the manifest of a bundle as versions that did not record a field wrote it."""
    raw = json.loads((path / "lminf.json").read_text(encoding="utf-8"))
    raw["source"]["rewritten"].pop(name)
    raw["manifest_sha256"] = content_sha256(raw)
    return read_manifest(json.dumps(raw).encode(), "lminf.json")


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("integers", [True, False])
def test_validate_and_the_card_say_what_was_compared_and_can_be(integers, check, foreign, tmp_path):
    source = shutil.copytree(foreign.optimum("llama"), tmp_path / "llama")
    if integers:
        onnx.save(int4(onnx.load(str(source / "model.onnx"))), str(source / "model.onnx"))
    bundle = lminf_export.rewrite(source, tmp_path / "b", check=check, **LAMBDA)
    assert bundle.manifest.source.rewritten.compared == check
    checkpoint = DATA / "llama" / "checkpoint"
    for model in [(), *([("--model", checkpoint)] if integers else [])]:
        result = lminf("validate", bundle.path, *model)
        assert result.exit_code == 2
        assert ("was compared with that graph when it was written" in result.stderr) == check
        assert ("without comparing" in result.stderr) == (not check)
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert ("lminf validate DIR --model CHECKPOINT " in card) == (not integers)
    assert ("lminf validate" in card) == (not integers)
    old = manifest_without(bundle.path, "compared")
    with pytest.raises(InputError) as refusal:
        require_comparable(old, None)
    assert "comparing" not in str(refusal.value)
    assert "compared" not in str(refusal.value)
