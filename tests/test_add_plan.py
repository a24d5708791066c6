"""A bundle written for a build elsewhere, and the plan that comes back."""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess

import pytest

from lminf_export.bundle.folder import Bundle
from lminf_export.cli.export import export_command
from lminf_export.cli.main import cli
from lminf_export.engine import add_plan as module
from lminf_export.engine import tensorrt
from lminf_export.engine.add_plan import add_plan, read_version
from lminf_export.engine.common import EngineFacts, profiles
from lminf_export.engine.options import EngineOptions
from lminf_export.errors import BundleError, EngineError, SessionError
from lminf_export.export.run import export
from lminf_export.runtime.gpu import Gpu
from tests.support.tiny_models import save_llama

LIBRARY = b"\x7fELF getCreators LambdaAttention"


def plan_bytes(version=(10, 16, 1, 11), tag=b"ftrt", layout=0):
    return struct.pack("<4sI16x4B", tag, layout, *version) + b"and so on"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return export(source, out, window_size=11, chunk_size=7, builder="none").path


@pytest.fixture
def bundle(exported, tmp_path):
    return Bundle.open(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "built.plan"
    path.write_bytes(plan_bytes())
    return path


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "some.so"
    path.write_bytes(LIBRARY)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_a_bundle_for_a_build_elsewhere_has_the_graph_and_the_command(bundle):
    recipe = bundle.manifest.engine_recipe
    assert (recipe.graph, recipe.file, recipe.needs_plugin) == ("engine.onnx", "engine.plan", True)
    assert recipe.command.startswith("trtexec --onnx=engine.onnx --saveEngine=engine.plan ")
    assert bundle.manifest.engine is None
    assert bundle.manifest.files["engine.onnx"].role == "engine_graph"
    assert bundle.manifest.dtype == "float16"


@pytest.mark.slow
def test_the_named_library_and_plan_go_into_the_recipe(source, tmp_path, library):
    bundle = export(
        source,
        tmp_path / "out" / "llama.plan",
        window_size=11,
        builder="none",
        engine_options=EngineOptions(plugin=library, workspace="1G"),
    )
    assert bundle.manifest.engine_recipe.file == "llama.plan"
    assert bundle.manifest.files["liblminf_tensorrt.so"].role == "plugin"
    assert (bundle.path / "liblminf_tensorrt.so").read_bytes() == LIBRARY


@pytest.mark.slow
def test_without_the_plugin_the_recipe_is_of_standard_operators(source, tmp_path):
    options = EngineOptions(plugin="none")
    bundle = export(
        source, tmp_path / "out", window_size=11, builder="none", engine_options=options
    )
    recipe = bundle.manifest.engine_recipe
    assert not recipe.needs_plugin
    assert "aliasedPluginIO" not in recipe.command


@pytest.mark.parametrize("in_the_folder", [False, True])
def test_a_plan_joins_its_bundle(bundle, plan, library, in_the_folder):
    if in_the_folder:  # where the command writes it
        plan = plan.rename(bundle.path / "engine.plan")
        library.rename(bundle.path / "liblminf_tensorrt.so")
    added = add_plan(bundle.path, plan, target="sm_90", plugin=None if in_the_folder else library)
    engine = added.manifest.engine
    assert (engine.builder, engine.version, engine.target) == ("tensorrt", "10.16.1.11", "sm_90")
    assert (engine.ring_writes, engine.sinks_in_place) == ("circular", True)
    assert engine.plugin.sha256 == added.manifest.files["liblminf_tensorrt.so"].sha256
    assert engine.profiles == bundle.manifest.engine_recipe.profiles
    assert not engine.executed
    assert added.plugin_path.read_bytes() == LIBRARY
    assert names(added.path) == sorted([*added.manifest.files, "lminf.json"])
    Bundle.open(added.path, "full")


def test_a_library_in_a_foreign_bundle_is_asked_for(bundle, plan, library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    inside = library.rename(bundle.path / "liblminf_tensorrt.so")
    with pytest.raises(EngineError, match="is code, and this bundle was not exported here"):
        add_plan(bundle.path, plan, target="sm_90")
    with pytest.raises(SessionError, match="is not the bundle of SHA-256"):
        add_plan(bundle.path, plan, target="sm_90", trust_plan="0" * 64)
    add_plan(bundle.path, plan, target="sm_90", trust_plan=True)
    add_plan(bundle.path, plan, target="sm_90", plugin=inside, force=True)
    add_plan(bundle.path, plan, target="sm_80", force=True)  # what was added here is trusted


def test_a_second_plan_needs_force(bundle, plan, library):
    add_plan(bundle.path, plan, target="sm_90", plugin=library)
    with pytest.raises(EngineError, match=r"has a plan already \(tensorrt 10\.16\.1\.11"):
        add_plan(bundle.path, plan, target="sm_80")
    added = add_plan(bundle.path, plan, target="sm_80", force=True)
    assert added.manifest.engine.target == "sm_80"


REFUSED = {
    "no plan": (b"PK\x03\x04" + bytes(40), {}, "is not a plan of TensorRT 10.3 or later"),
    "short": (b"ftrt", {}, "is not a plan"),
    "another layout": (plan_bytes(layout=9), {}, "is not a plan"),
    "of RTX": (plan_bytes(tag=b"vtrt"), {}, "is a plan of TensorRT for RTX"),
    "too old": (
        plan_bytes((10, 2, 0, 1)),
        {},
        r"built by TensorRT 10\.2\.0\.1; TensorRT 10\.3 or later is required",
    ),
    "no target": (plan_bytes(), {"target": None}, "which GPU is the plan for"),
    "odd target": (plan_bytes(), {"target": "H100"}, "target='H100': must be a compute"),
    "no library": (plan_bytes(), {"plugin": None}, "lacks liblminf_tensorrt.so"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_join_is_refused_and_changes_nothing(bundle, plan, library, monkeypatch, case):
    content, changes, words = REFUSED[case]
    monkeypatch.setattr(module, "find_gpu", lambda: "no NVIDIA driver is installed")
    plan.write_bytes(content)
    before = {name: (bundle.path / name).read_bytes() for name in names(bundle.path)}
    with pytest.raises(EngineError, match=words):
        add_plan(bundle.path, plan, **({"target": "sm_90", "plugin": library} | changes))
    assert {name: (bundle.path / name).read_bytes() for name in names(bundle.path)} == before


@pytest.mark.slow
def test_a_bundle_without_a_recipe_takes_no_plan(source, tmp_path, plan):
    bundle = export(source, tmp_path / "plain", window_size=11)
    with pytest.raises(EngineError, match="no recipe of a TensorRT engine"):
        add_plan(bundle.path, plan, target="sm_90")


def test_where_the_gpu_is_the_plan_is_loaded_before_it_joins(bundle, plan, library, monkeypatch):
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("a card", (9, 0)))
    fake = type("tensorrt", (), {"__version__": "10.16.1.11"})
    monkeypatch.setattr(module.importlib, "import_module", lambda name: fake)
    seen = []
    monkeypatch.setattr(module, "TensorRTSession", seen.append)
    added = add_plan(bundle.path, plan, plugin=library)
    (trial,) = seen
    # It stood beside the bundle's own files under a name nobody reads.
    assert trial.plan_path.name.endswith(".partial")
    assert trial.plugin_path.name.endswith(".partial")
    assert added.manifest.engine.target == "sm_90"
    assert "loaded here" in added.manifest.engine.note

    def refuse(trial):
        raise SessionError("the engine has other tensors")

    monkeypatch.setattr(module, "TensorRTSession", refuse)
    before = names(bundle.path)
    plan.write_bytes(plan_bytes() + b"other")
    with pytest.raises(SessionError, match="other tensors"):
        add_plan(bundle.path, plan, plugin=library, force=True)
    assert names(bundle.path) == before
    Bundle.open(bundle.path, "full")


def test_an_altered_library_is_found_when_the_bundle_is_opened(bundle, plan, library):
    added = add_plan(bundle.path, plan, target="sm_90", plugin=library)
    added.plugin_path.write_bytes(LIBRARY.swapcase())
    with pytest.raises(BundleError, match=r"liblminf_tensorrt\.so was altered"):
        Bundle.open(added.path)


def test_the_release_is_read_from_the_plan(plan):
    assert read_version(plan) == "10.16.1.11"


def trtexec(folder):
    """A program that says what it was asked for, and where, and writes the plan it was to build."""
    path = folder / "a trtexec"
    path.write_text(
        '#!/bin/sh\npwd\nfor word; do echo "$word"; '
        'case "$word" in --saveEngine=*) echo plan >"${word#*=}";; esac; done\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["engine.plan", "my $(plan) it's.plan"])
def test_the_script_in_the_bundle_runs_the_recipe(wide, tmp_path, library, name):
    out = tmp_path / "a folder" / "b"
    options = EngineOptions(plugin=library)
    bundle = export(
        wide, out / name, window_size=11, chunk_size=7, builder="none", engine_options=options
    )
    script = bundle.path / "build_engine.sh"
    assert os.access(script, os.X_OK)
    tool = trtexec(tmp_path)
    for program in ([str(script)], ["sh", os.path.relpath(script, tmp_path)]):
        done = subprocess.run(
            program,
            cwd=tmp_path,
            env={**os.environ, "TRTEXEC": str(tool)},
            check=True,
            capture_output=True,
            text=True,
        )
        where, *words = done.stdout.splitlines()
        assert where == str(bundle.path)
        command = bundle.manifest.engine_recipe.command
        assert words[:-1] == shlex.split(command)[1:]
        assert shlex.split(words[-1].partition(": ")[2]) == ["lminf", "add-plan", ".", f"./{name}"]
        assert (bundle.path / name).read_text() == "plan\n"
    assert str(tmp_path) not in script.read_text()
    done = subprocess.run(
        [str(script)], env={**os.environ, "TRTEXEC": "/none"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.splitlines()[0][:25]) == (2, "error: /none is not here;")
    (bundle.path / "liblminf_tensorrt.so").unlink()
    done = subprocess.run(
        [str(script)], env={**os.environ, "TRTEXEC": str(tool)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "liblminf_tensorrt.so must lie beside this script" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo-llama", "demo-mpt"])
def test_the_demo_models_get_a_script_that_builds_their_engine(tmp_path, library, model):
    options = EngineOptions(plugin=library)
    bundle = export(f"examples/{model}", tmp_path / model, builder="none", engine_options=options)
    assert bundle.manifest.engine_recipe.needs_plugin
    files = bundle.manifest.files.keys()
    assert {"engine.onnx", "build_engine.sh", "liblminf_tensorrt.so"} <= files
    assert not any("TensorRT will refuse" in notice for notice in bundle.manifest.notices)


def test_there_is_no_script_where_trtexec_cannot_build_the_graph(bundle):
    assert bundle.manifest.engine_recipe.needs_plugin
    assert "build_engine.sh" not in bundle.manifest.files
    assert any("TensorRT will refuse this graph" in notice for notice in bundle.manifest.notices)


def test_the_card_names_the_plan_once_it_is_there(bundle, plan, library):
    assert "10.16.1.11" not in (bundle.path / "README.md").read_text(encoding="utf-8")
    added = add_plan(bundle.path, plan, target="sm_90", plugin=library)
    card = (added.path / "README.md").read_text(encoding="utf-8")
    assert "`engine.plan` is of tensorrt 10.16.1.11 for sm_90" in card


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose heads the plugin has kernels for."""
    path = tmp_path_factory.mktemp("wide") / "model"
    return save_llama(path, num_hidden_layers=2, head_dim=64)


@pytest.mark.slow
def test_the_commands_print_what_to_do_next(wide, tmp_path, plan, library, capsys):
    out = tmp_path / "bundle"
    words = ["--model", str(wide), "--out", str(out), "--builder", "none"]
    export_command.main([*words, "--window-size", "11"], standalone_mode=False)
    said = capsys.readouterr().out
    assert f"build the engine: sh {out}/build_engine.sh" in said
    assert f"lminf add-plan {out} {out}/engine.plan --target sm_XX" in said
    assert max(map(len, said.splitlines())) < 400
    cli.main(
        ["add-plan", str(out), str(plan), "--target", "sm_90", "--plugin", str(library)],
        standalone_mode=False,
    )
    assert "tensorrt 10.16.1.11 for sm_90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": "x", "engine_options": EngineOptions(workspace=1)}, "workspace: no engine is"),
        ({"out": "x", "builder": "tensorrt-rtx"}, "builder: no engine is asked for"),
        (
            {
                "out": "x/engine.plan",
                "builder": "tensorrt-rtx",
                "engine_options": EngineOptions(timing_cache="cache"),
            },
            "timing_cache: tensorrt-rtx has no such setting",
        ),
    ],
)
def test_settings_without_use_are_refused(source, tmp_path, settings, words, monkeypatch):
    monkeypatch.setattr("lminf_export.engine.builders.importlib.util.find_spec", lambda name: True)
    settings["out"] = tmp_path / settings["out"]
    with pytest.raises(Exception, match=words):
        export(source, **settings)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_build_here_puts_plan_plugin_and_recipe_into_the_bundle(tmp_path, library, monkeypatch):
    model = save_llama(tmp_path / "model", num_hidden_layers=2, head_dim=64)
    monkeypatch.setattr("lminf_export.engine.builders.importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: Gpu("a card", (9, 0)))
    asked = []

    def build(request, progress):
        asked.append(request)
        request.plan_path.write_bytes(b"a plan")
        return EngineFacts(
            *("tensorrt", "11.4.0.106", "sm_90", request.contract.dtype, profiles(request)),
            cache_updates=len(request.updated_in_place),
            seconds=1.0,
            bytes=6,
        )

    monkeypatch.setattr(tensorrt, "build", build)
    options = EngineOptions(plugin=library, builder_optimization_level=4)
    settings = {"window_size": 11, "chunk_size": 7, "engine_options": options}
    bundle = export(model, tmp_path / "out" / "engine.plan", builder="tensorrt", **settings)
    (request,) = asked
    # It was built from the bundle's own files, so the hashes are of what was used.
    assert request.onnx_path.name == "engine.onnx"
    assert request.plugin_path.name == "liblminf_tensorrt.so"
    assert request.plugin_path.parent == request.plan_path.parent
    engine = bundle.manifest.engine
    assert engine.plugin.sha256 == bundle.manifest.files["liblminf_tensorrt.so"].sha256
    assert engine.options == {"builder_optimization_level": "4"}
    assert (engine.ring_writes, engine.sinks_in_place) == ("circular", True)
    assert bundle.manifest.engine_recipe.command.startswith("trtexec ")
    assert bundle.plugin_path.read_bytes() == LIBRARY
    assert str(tmp_path) not in (bundle.path / "lminf.json").read_text(encoding="utf-8")


def test_layers_without_kernels_are_refused_before_anything_is_written(
    source, tmp_path, library, monkeypatch
):
    monkeypatch.setattr("lminf_export.engine.builders.importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: Gpu("a card", (9, 0)))
    options = EngineOptions(plugin=library)
    with pytest.raises(EngineError, match=r"head_dim \d+: the plugin's kernels take 32, 64"):
        export(
            source,
            tmp_path / "x" / "e.plan",
            builder="tensorrt",
            engine_options=options,
            window_size=11,
        )
    assert not (tmp_path / "x").exists()
