"""Model types that are other names of a tested one, and those that are not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from lminf_export import ModelError, export, load
from lminf_export.checkpoint.source import open_source
from lminf_export.cli.main import cli
from tests.support.tiny_models import save_llama


def renamed(folder, **changes):
    """Save a Llama and change its config.json; None takes an entry out."""
    save_llama(folder)
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


SURE = {
    "former name": {"model_type": "code_llama", "architectures": None},
    "class": {"model_type": "yi", "architectures": ["LlamaForCausalLM"]},
    "class in an old spelling": {"model_type": "llama-hf", "architectures": ["LLaMAForCausalLM"]},
}


@pytest.mark.parametrize("changes", SURE.values(), ids=SURE)
def test_another_name_of_a_tested_type_is_read_as_that_type(changes, tmp_path):
    source = open_source(renamed(tmp_path / "m", **changes))
    assert (source.model_type, source.named) == ("llama", changes["model_type"])


@pytest.mark.slow
def test_a_model_by_another_name_exports_as_by_its_own(tmp_path):
    settings = {"window_size": 16, "chunk_size": 8}
    bundle = export(renamed(tmp_path / "m", **SURE["former name"]), tmp_path / "b", **settings)
    twin = export(save_llama(tmp_path / "llama"), tmp_path / "twin", **settings)
    assert any("'code_llama' is unknown" in notice for notice in bundle.manifest.notices)
    assert bundle.manifest.model_type == "llama"
    tokens = np.arange(3, 40)[None]
    found, wanted = (
        model.forward(tokens, model.new_state()) for model in map(load, (bundle.path, twin.path))
    )
    assert np.array_equal(found, wanted)
    for own in ([], ["--model", str(tmp_path / "m")]):
        result = CliRunner().invoke(cli, ["validate", str(bundle.path), *own])
        assert result.exit_code == 0, result.output


UNSURE = {
    "another class": {"model_type": "xverse", "architectures": ["XverseForCausalLM"]},
    "no class": {"model_type": "xverse", "architectures": None},
    "several classes": {"model_type": "x", "architectures": ["LlamaForCausalLM"] * 2},
    "a class that writes no text": {"model_type": "x", "architectures": ["LlamaModel"]},
    "not a list": {"model_type": "x", "architectures": "LlamaForCausalLM"},
}


@pytest.mark.parametrize("changes", UNSURE.values(), ids=UNSURE)
def test_a_type_that_may_be_another_model_is_refused(changes, tmp_path):
    with pytest.raises(ModelError, match="is unknown to transformers"):
        open_source(renamed(tmp_path / "m", **changes))


def test_a_type_with_code_of_its_own_is_no_other_name(tmp_path):
    """Its class may have the name of one of transformers and compute something else."""
    folder = renamed(
        tmp_path / "m",
        model_type="yi",
        architectures=["LlamaForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_yi.LlamaForCausalLM"},
    )
    with pytest.raises(ModelError, match="custom code of its repository"):
        open_source(folder)
