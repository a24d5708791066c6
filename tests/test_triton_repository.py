"""Repositories for Triton: what is written, and what is refused before anything is."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner

from lminf_export import load
from lminf_export.bundle.folder import Bundle
from lminf_export.cli.export_triton import export_triton_command
from lminf_export.errors import BundleError, ExportError, LminfError
from lminf_export.triton.configs import tensorrt_config
from lminf_export.triton.repository import export_triton


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_repository_is_whole(demo_lm, tmp_path):
    out = export_triton(
        demo_lm.bundle.path, tmp_path / "models", name="demo", slots=3,
        backends=("python", "onnxruntime"), parameters={"session_bytes": "1000000"},
    )  # fmt: skip
    assert out == tmp_path / "models"
    assert {path.name for path in tmp_path.iterdir()} == {"models"}
    found = names_in(out)
    assert {"README.md", "demo/config.pbtxt", "demo/1/model.py"} <= found
    assert {"demo_implicit/config.pbtxt", "demo_implicit/1/model.onnx"} <= found
    # The bundle in it is one, and its weights take no second place on the disk.
    inside = Bundle.open(out / "demo" / "1" / "bundle", verify="full")
    assert inside.manifest == demo_lm.bundle.manifest
    (weights,) = inside.manifest.files_of("weights")
    assert os.path.samefile(inside.path / weights, demo_lm.bundle.path / weights)
    config = (out / "demo" / "config.pbtxt").read_text()
    assert 'key: "slots" value { string_value: "3" }' in config
    assert 'key: "session_bytes" value { string_value: "1000000" }' in config
    implicit = (out / "demo_implicit" / "config.pbtxt").read_text()
    assert implicit.count("input_name:") == 1 + len(
        list(demo_lm.bundle.manifest.contract.caches(present=False))
    )
    assert "max_batch_size: 3" in implicit


def test_an_empty_folder_is_as_good_as_none(demo_lm, tmp_path):
    (tmp_path / "models").mkdir()
    export_triton(demo_lm.bundle.path, tmp_path / "models")
    assert (tmp_path / "models" / demo_lm.bundle.path.resolve().name / "config.pbtxt").is_file()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backends": ()}, "backends"),
        ({"backends": "python"}, "backends"),
        ({"backends": ("vllm",)}, "backends"),
        ({"backends": ("tensorrt",)}, "has no plan"),
        ({"slots": 0}, "slots"),
        ({"name": "a/b"}, "a model's name"),
        ({"name": ""}, "a model's name"),
        ({"parameters": {"slot": "3"}}, "slot"),
        ({"parameters": {"session_bytes": "much"}}, "session_bytes"),
        ({"parameters": {"session_bytes": 5}}, "must be texts"),
        ({"parameters": {"session_secret_file": "f"}}, "goes with a session_store"),
        ({"out": 5}, "out"),
    ],
)
def test_wrong_arguments_write_nothing(demo_lm, tmp_path, fields, words):
    given = {"out": tmp_path / "models", **fields}
    with pytest.raises(LminfError, match=words) as caught:
        export_triton(demo_lm.bundle.path, **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_left_alone(demo_lm, tmp_path):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(ExportError, match="not empty"):
        export_triton(demo_lm.bundle.path, tmp_path)
    assert names_in(tmp_path) == {"kept"}
    with pytest.raises(ExportError, match="no folder"):
        export_triton(demo_lm.bundle.path, tmp_path / "kept")


def test_an_export_that_fails_leaves_nothing(demo_lm, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lminf_export.triton.repository.readme", full)
    with pytest.raises(ExportError, match="No space left"):
        export_triton(demo_lm.bundle.path, tmp_path / "models")
    assert not list(tmp_path.iterdir())


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError):
        export_triton(tmp_path / "nothing", tmp_path / "models")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_repository(demo_lm, tmp_path):
    command = [
        str(demo_lm.bundle.path), "--out", str(tmp_path / "models"), "--name", "demo",
        "--backend", "onnxruntime", "--parameter", "provider=cpu",
    ]  # fmt: skip
    result = CliRunner().invoke(export_triton_command, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "models" / "demo_implicit")
    again = CliRunner().invoke(export_triton_command, command)
    assert again.exit_code == 2
    assert "not empty" in again.stderr
    wrong = CliRunner().invoke(export_triton_command, [*command, "--parameter", "slots"])
    assert wrong.exit_code == 2
    assert "expected NAME=VALUE" in wrong.stderr


def test_the_bundle_in_a_repository_runs(demo_lm, tmp_path):
    out = export_triton(demo_lm.bundle.path, tmp_path / "models", name="demo")
    lm = load(out / "demo" / "1" / "bundle", threads=1)
    assert list(lm.generate([1, 2, 3], max_new_tokens=5)) == list(
        demo_lm.generate([1, 2, 3], max_new_tokens=5)
    )


def test_a_plan_s_configuration_names_every_tensor(demo_lm):
    manifest = demo_lm.bundle.manifest
    text = tensorrt_config("plan", manifest, 4, "/models/plugin.so")
    for spec in (*manifest.contract.inputs(), *manifest.contract.outputs()):
        assert f'name: "{spec.name}"' in text
    assert "NOT RUN" in text
    assert "/models/plugin.so" in text
    assert "ring_" not in text
