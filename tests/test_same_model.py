"""`validate --model OTHER` is one line, whatever the other model is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import lminf_export
from benchmarks.support.families import CASES
from lminf_export.errors import InputError, LminfError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LLAMA = next(case for case in CASES if case.model_type == "llama")
OTHERS = {
    "layers": replace(LLAMA, changes={**LLAMA.changes, "num_hidden_layers": 4}),
    "width": replace(LLAMA, changes={**LLAMA.changes, "intermediate_size": 40}),
    "vocabulary": replace(LLAMA, changes={**LLAMA.changes, "vocab_size": 140}),
    "groups": replace(LLAMA, changes={**LLAMA.changes, "num_key_value_heads": 1}),
    "family": next(case for case in CASES if case.model_type == "qwen3"),
    "experts": next(case for case in CASES if case.model_type == "mixtral"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    source = LLAMA.save(folder / "model")
    return lminf_export.export(source, folder / "bundle", window_size=8, chunk_size=4).path


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_is_named(kind, bundle, tmp_path):
    other = OTHERS[kind].save(tmp_path / "other")
    with pytest.raises(InputError, match=r"is not the one bundle .* was exported from") as caught:
        lminf_export.validate(bundle, model=str(other))
    assert len(str(caught.value)) <= 300
    assert "'model'" in str(caught.value)


def test_a_demo_model_of_another_family_is_named(bundle):
    with pytest.raises(InputError, match="its model_type is mpt, the bundle's llama"):
        lminf_export.validate(bundle, model=str(EXAMPLES / "demo-mpt"))


def test_tensors_of_other_names_are_one_line(bundle, tmp_path):
    folder = shutil.copytree(bundle.parent / "model", tmp_path / "renamed")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"mlp.up_proj", b"mlp.xx_proj"))
    with pytest.raises(LminfError, match="lacks"):
        lminf_export.validate(bundle, model=str(folder))


def test_the_model_itself_with_other_numbers_is_compared(bundle, tmp_path):
    other = LLAMA.save(tmp_path / "other", seed=1)
    assert json.loads((other / "config.json").read_text())["model_type"] == "llama"
    report = lminf_export.validate(bundle, model=str(other))
    assert report.differing_weights
