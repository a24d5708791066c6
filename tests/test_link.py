"""`--weights link`: the bundle's weights are the model's own files, and the manifest says so."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.support.families import CASES
from lminf_export import Bundle, ConfigError, ModelError, export, load
from lminf_export.cli.export import export_command
from lminf_export.cli.validate import validate_command
from tests.support.tiny_models import save_llama

SETTINGS = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 7}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "m", shard="100KB")


@pytest.fixture(scope="module")
def linked(sharded):
    # Beside the source: links do not cross disks.
    return export(sharded, sharded.parent / "linked", weights="link", **SETTINGS)


@pytest.mark.slow
def test_shards_are_the_same_files_and_the_manifest_says_so(sharded, linked):
    names = {p.name for p in sharded.glob("*.safetensors")}
    assert len(names) > 1
    assert set(linked.manifest.linked_files) == set(linked.manifest.files_of("weights")) == names
    for name in names:
        assert os.path.samefile(sharded / name, linked.path / name)
    assert any("hard links" in notice for notice in linked.manifest.notices)
    assert Bundle.open(linked.path, verify="full").manifest == linked.manifest


@pytest.mark.slow
def test_a_linked_bundle_computes_what_a_copied_one_does(sharded, linked, tmp_path):
    copied = export(sharded, tmp_path / "copied", **SETTINGS)
    assert copied.manifest.linked_files == ()
    ids = np.random.default_rng(0).integers(0, 131, (1, 90))
    logits = [load(b.path) for b in (linked, copied)]
    logits = [m.forward(ids, m.new_state()) for m in logits]
    assert np.array_equal(*logits)


def test_validate_and_transformers_read_it(sharded, linked):
    from transformers import AutoModelForCausalLM

    result = CliRunner().invoke(
        validate_command, [str(linked.path), "--model", str(sharded), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["differing_weights"] == []
    AutoModelForCausalLM.from_pretrained(linked.path)


@pytest.mark.slow
def test_a_source_changed_in_place_is_found(sharded, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sharded, source)
    bundle = export(source, tmp_path / "b", weights="link", **SETTINGS)
    path = min(source.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    with pytest.raises(Exception, match="was altered"):
        Bundle.open(bundle.path, verify="full")


@pytest.mark.slow
def test_replacing_a_linked_bundle_leaves_the_source_alone(sharded, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(sharded, source)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for weights in ("link", "copy", "link"):
        export(source, tmp_path / "b", weights=weights, force=True, **SETTINGS)
    shutil.rmtree(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"dtype": "float16"}, "--dtype float32"), ({"quantize": "int4"}, "copy")],
)
def test_what_would_have_to_be_converted_is_refused(settings, words, sharded, tmp_path):
    with pytest.raises((ModelError, ConfigError), match=words):
        export(sharded, tmp_path / "b", weights="link", **settings, **SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_experts_that_are_merged_cannot_be_linked(tmp_path):
    source = next(case for case in CASES if case.model_type == "mixtral").save(tmp_path / "m")
    with pytest.raises(ModelError, match="--weights copy"):
        export(source, tmp_path / "b", weights="link", **SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_another_disk_is_one_line(sharded, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    result = CliRunner().invoke(
        export_command,
        ["--model", str(sharded), "--out", str(tmp_path / "b"), "--weights", "link",
         "--window-size", "19"],
    )  # fmt: skip
    assert result.exit_code == 2
    assert "one disk" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sixteen_bit_weights_link_when_the_type_is_theirs(tmp_path):
    source = save_llama(tmp_path / "m", dtype=torch.float16)
    bundle = export(source, tmp_path / "b", weights="link", dtype="float16", **SETTINGS)
    model = load(bundle.path)
    assert np.isfinite(model.forward([[1, 2]], model.new_state())).all()
