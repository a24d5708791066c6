"""Repositories for Triton: what is written, and what is refused before anything is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from lminf_export import load
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import content_sha256
from lminf_export.cli.export_triton import export_triton_command
from lminf_export.errors import BundleError, ExportError, LminfError
from lminf_export.runtime.kernels import AUTO, find_kernels
from lminf_export.triton.repository import export_triton


def has_kernels():
    return find_kernels(AUTO, "cpu") is not None


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_repository_is_whole(demo_lm, tmp_path):
    source = shutil.copytree(demo_lm.bundle.path, tmp_path / "source")
    out = export_triton(
        source, tmp_path / "models", name="demo", slots=3,
        backends=("python", "onnxruntime"), parameters={"session_bytes": "1000000"},
    )  # fmt: skip
    assert out == tmp_path / "models"
    assert {path.name for path in tmp_path.iterdir()} == {"models", "source"}
    found = names_in(out)
    assert {"README.md", "demo/config.pbtxt", "demo/1/model.py"} <= found
    assert {"demo_implicit/config.pbtxt", "demo_implicit/1/model.onnx"} <= found
    # The bundle in it is one, of files of its own.
    inside = Bundle.open(out / "demo" / "1" / "bundle", verify="full")
    assert inside.manifest == demo_lm.bundle.manifest
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*") if path.is_file())
    onnx.checker.check_model(out / "demo_implicit" / "1" / "model.onnx")
    onnx.load(source / demo_lm.bundle.manifest.graph)
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
        ({"slots": 4097}, "slots=4097: must be at most 4096"),
        ({"name": "a/b"}, "a model's name"),
        ({"name": ""}, "a model's name"),
        ({"parameters": {"slot": "3"}}, "slot"),
        ({"parameters": {"session_bytes": "much"}}, "session_bytes"),
        ({"parameters": {"session_bytes": 5}}, "must be texts"),
        ({"parameters": {"session_secret_file": "f"}}, "goes with a session_store"),
        ({"out": 5}, "out"),
        ({"name": "\u00e9\u00b2"}, "a model's name"),
        ({"name": ".hidden"}, "a model's name"),
        ({"parameters": [1]}, "must be names and texts"),
        ({"parameters": "x"}, "must be names and texts"),
        ({"parameters": {"slots": "7"}}, "slots is an argument of its own"),
        ({"parameters": {"bundle": "/etc"}}, "bundle='/etc': expected bundle, which"),
        ({"parameters": {"template": "a\ud800"}}, "no text in UTF-8"),
        ({"parameters": {"trust_hash": "0" * 64}}, "has no plan, and a graph needs no trust"),
        ({"backends": ("onnxruntime",), "parameters": {"session_folder": "x"}}, "of the python"),
        ({"link": 1}, "link"),
    ],
)
def test_wrong_arguments_write_nothing(demo_lm, tmp_path, fields, words):
    given = {"out": tmp_path / "models", **fields}
    with pytest.raises(LminfError, match=words) as caught:
        export_triton(demo_lm.bundle.path, **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_name_may_have_dots_within(demo_lm, tmp_path):
    out = export_triton(demo_lm.bundle.path, tmp_path / "models", name="llama-3.2_b")
    assert (out / "llama-3.2_b" / "config.pbtxt").is_file()


def test_weights_are_linked_only_where_it_is_asked_for(demo_lm, tmp_path):
    source = shutil.copytree(demo_lm.bundle.path, tmp_path / "source")
    out = export_triton(source, tmp_path / "models", name="demo", link=True)
    manifest = demo_lm.bundle.manifest
    linked = {path.name for path in out.rglob("*") if path.is_file() and path.stat().st_nlink > 1}
    assert linked == set(manifest.files_of("weights"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_altered_bundle_is_refused(demo_lm, tmp_path, name):
    source = shutil.copytree(demo_lm.bundle.path, tmp_path / "source")
    content = bytearray((source / name).read_bytes())
    content[len(content) // 2] ^= 1
    (source / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        export_triton(source, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_repository_is_not_put_into_its_bundle(demo_lm, tmp_path):
    source = shutil.copytree(demo_lm.bundle.path, tmp_path / "source")
    (tmp_path / "also").symlink_to(source)
    for out in (source / "models", tmp_path / "also" / "models"):
        with pytest.raises(ExportError, match="is in the bundle"):
            export_triton(source, out)
    assert names_in(source) == names_in(demo_lm.bundle.path)


def test_the_current_folder_is_refused(demo_lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (".", "", tmp_path.parent):
        with pytest.raises(ExportError, match=r"current folder|is not empty|an empty path"):
            export_triton(demo_lm.bundle.path, out)
    assert export_triton(demo_lm.bundle.path, "models") == tmp_path / "models"


def test_a_mount_point_is_refused(demo_lm, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "models")
    with pytest.raises(ExportError, match="is a mount point"):
        export_triton(demo_lm.bundle.path, tmp_path / "models")


def test_kernels_none_is_honoured_by_the_bare_graph(demo_lm, tmp_path):
    out = export_triton(
        demo_lm.bundle.path, tmp_path / "models", name="demo", backends=("onnxruntime",),
        parameters={"kernels": "none"},
    )  # fmt: skip
    assert "op_library_filename" not in (out / "demo_implicit" / "config.pbtxt").read_text()
    assert not list(out.rglob("*.so"))


def test_a_folder_with_other_things_is_left_alone(demo_lm, tmp_path):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(ExportError, match="not empty"):
        export_triton(demo_lm.bundle.path, tmp_path)
    assert names_in(tmp_path) == {"kept"}
    with pytest.raises(ExportError, match="is a file"):
        export_triton(demo_lm.bundle.path, tmp_path / "kept")


def test_an_export_that_fails_leaves_nothing(demo_lm, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lminf_export.triton.repository.readme", full)
    with pytest.raises(ExportError, match="No space left"):
        export_triton(demo_lm.bundle.path, tmp_path / "a" / "b" / "models")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_cleared(demo_lm, tmp_path):
    left = tmp_path / ".models.partial-01234567"
    left.mkdir()
    (left / "README.md").write_text("half")
    export_triton(demo_lm.bundle.path, tmp_path / "models")
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError):
        export_triton(tmp_path / "nothing", tmp_path / "models")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_repository(demo_lm, tmp_path):
    command = [
        str(demo_lm.bundle.path), "--out", str(tmp_path / "models"), "--name", "demo",
        "--backend", "onnxruntime", "--parameter", "kernels=none",
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slots", "4", "--parameter", "slots=7"], "give it by --slots"),
        (["--session-folder", "a", "--parameter", "session_folder=b"], "give it by --session-f"),
        (["--parameter", "threads=1", "--parameter", "threads=2"], "given more than once"),
        (["--name", "a", "--name", "b"], "given more than once"),
        (["--out", "elsewhere"], "given more than once"),
        (["--backend", "onnxruntime", "--session-folder", "/x"], "of the python backend"),
        (["--backend", "onnxruntime", "--parameter", "threads=1"], "of the python backend"),
        (["--parameter", "template=\udcff"], "no text in UTF-8"),
        (["--session-folder", "x\udcff"], "no text in UTF-8"),
        (["--session-folder", ""], "is empty"),
        (["--parameter", "template="], "is empty"),
    ],
)
def test_options_that_say_two_things_or_none_write_nothing(demo_lm, tmp_path, options, words):
    command = [str(demo_lm.bundle.path), "--out", str(tmp_path / "models"), *options]
    result = CliRunner().invoke(export_triton_command, command)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_bundle_in_a_repository_runs(demo_lm, tmp_path):
    out = export_triton(demo_lm.bundle.path, tmp_path / "models", name="demo")
    lm = load(out / "demo" / "1" / "bundle", threads=1)
    assert list(lm.generate([1, 2, 3], max_new_tokens=5)) == list(
        demo_lm.generate([1, 2, 3], max_new_tokens=5)
    )


def test_models_are_put_beside_others_of_a_repository(demo_lm, tmp_path):
    out = export_triton(demo_lm.bundle.path, tmp_path / "models", name="a")
    before = {name: (out / name).read_bytes() for name in names_in(out) if name != "README.md"}
    assert export_triton(demo_lm.bundle.path, out, name="b", backends=("python", "onnxruntime"))
    assert {path.name for path in out.iterdir()} == {"README.md", "a", "b", "b_implicit"}
    assert {path.name for path in tmp_path.iterdir()} == {"models"}
    assert all((out / name).read_bytes() == content for name, content in before.items())
    page = (out / "README.md").read_text()
    for heading in ("## a: our", "## b: our", "## b_implicit: the bare"):
        assert page.count(heading) == 1
    library = str(out / "b_implicit" / "1" / "liblminf_ort.so")
    config = (out / "b_implicit" / "config.pbtxt").read_text()
    assert library in config or not has_kernels()


def test_a_model_that_is_there_is_not_replaced(demo_lm, tmp_path):
    out = export_triton(demo_lm.bundle.path, tmp_path / "models", name="a_implicit")
    with pytest.raises(ExportError, match="is not empty: it has a_implicit already"):
        export_triton(demo_lm.bundle.path, out, name="a", backends=("python", "onnxruntime"))
    assert {path.name for path in out.iterdir()} == {"README.md", "a_implicit"}


def test_a_repository_of_others_keeps_its_files(demo_lm, tmp_path):
    theirs = tmp_path / "models" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "config.pbtxt").write_text('name: "theirs"')
    (tmp_path / "models" / "README.md").write_text("theirs")
    export_triton(demo_lm.bundle.path, tmp_path / "models", name="a")
    assert (tmp_path / "models" / "a" / "config.pbtxt").is_file()
    assert (theirs / "config.pbtxt").read_text() == 'name: "theirs"'
    assert (tmp_path / "models" / "README.md").read_text() == "theirs"


def test_what_cannot_be_put_beside_others_leaves_nothing(demo_lm, tmp_path, monkeypatch):
    out = export_triton(demo_lm.bundle.path, tmp_path / "models", name="a")
    rename = Path.rename

    def fails(self, target):
        if Path(target).name == "b_implicit":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ExportError, match="No space left"):
        export_triton(demo_lm.bundle.path, out, name="b", backends=("python", "onnxruntime"))
    assert {path.name for path in out.iterdir()} == {"README.md", "a"}
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


def test_the_command_names_the_models_that_it_wrote(demo_lm, tmp_path):
    command = [str(demo_lm.bundle.path), "--out", str(tmp_path / "models"), "--name"]
    for name in ("a", "b"):
        result = CliRunner().invoke(export_triton_command, [*command, name])
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == str(tmp_path / "models" / name)


def test_a_model_that_will_not_load_without_a_tokenizer_is_told_of(demo_lm, tmp_path, caplog):
    source = shutil.copytree(demo_lm.bundle.path, tmp_path / "source")
    raw = json.loads((source / "lminf.json").read_text())
    for name in demo_lm.bundle.manifest.files_of("tokenizer"):
        (source / name).unlink()
        del raw["files"][name]
    raw["manifest_sha256"] = content_sha256(raw)
    (source / "lminf.json").write_text(json.dumps(raw))
    export_triton(source, tmp_path / "graph", backends=("onnxruntime",))
    assert not caplog.records
    export_triton(source, tmp_path / "models")
    assert "has no tokenizer.json: the model of the python backend will not load" in caplog.text
