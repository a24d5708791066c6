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
from lminf_export.bench.floor import weight_bytes_per_step
from lminf_export.cli.main import cli
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
