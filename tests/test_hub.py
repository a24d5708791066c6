"""Bundles on a hub: pushed, fetched, kept, and what is said when that cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from lminf_export.bundle.hub import find_bundle
from lminf_export.errors import BundleError
from tests.support.fake_hub import TOKEN, Repository, running_hub
from tests.support.tensorrt_doubles import bundle_with_plan
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

TINY = TinyModel()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return TINY.write(tmp_path_factory.mktemp("bundles") / "b")


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Run Python, or `lminf`, as a user of that hub; huggingface_hub reads its address once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)

    def call(*words, **changes):
        command = ["-c", words[0]] if len(words) == 1 else ["-m", "lminf_export.cli.main", *words]
        return subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            env={**environment, **changes},
            cwd=tmp_path,
            timeout=300,
        )

    return call


LOGITS = """
import json, sys, lminf_export
model = lminf_export.load({name!r}, threads=1, kernels="none"{more})
logits = model.forward([[1, 2, 3]], model.new_state(), logits="last")
print(json.dumps([str(model.bundle.path), float(logits.sum())]))
"""


def loaded(run, name, more="", **changes):
    done = run(LOGITS.format(name=str(name), more=more), **changes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def last_line(done):
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_what_is_pushed_is_what_is_loaded_also_without_a_network(hub, run, bundle):
    done = run("push", bundle.path, "org/tiny", "--private")
    assert done.returncode == 0, done.stderr
    pushed = hub.repositories["org/tiny"]
    assert pushed.private
    assert done.stdout.strip() == f"{hub.address}/org/tiny/commit/{pushed.branches['main']}"
    assert len(pushed.commits) == 2  # the empty one, and one with everything
    files = pushed.commits[pushed.branches["main"]]
    assert files.keys() == {*bundle.manifest.files, "lminf.json"}
    place, total = loaded(run, "org/tiny")
    assert "models--org--tiny" in place
    assert total == loaded(run, bundle.path)[1]
    before = len(hub.requests)
    assert loaded(run, "org/tiny", HF_HUB_OFFLINE="1") == [place, total]
    assert len(hub.requests) == before


@pytest.mark.slow
def test_files_that_are_not_the_bundles_are_neither_pushed_nor_fetched(hub, run, bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "b")
    (folder / ".secret").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    assert run("push", folder, "org/tiny").returncode == 0
    repository = hub.repositories["org/tiny"]
    assert not {".secret", "notes.txt"} & repository.commits[repository.branches["main"]].keys()
    repository.commit("main", {"other.bin": bytes(10**6), "sub/engine.plan": b"code"})
    loaded(run, "org/tiny")
    assert not [line for line in hub.requests if "other.bin" in line or "sub/" in line]


@pytest.mark.slow
def test_revisions(hub, run, bundle, tmp_path):
    other = TinyModel(seed=1).write(tmp_path / "other").path
    assert run("push", bundle.path, "org/tiny").returncode == 0
    assert run("push", other, "org/tiny", "--revision", "dev", "--message", "x").returncode == 0
    main, dev = loaded(run, "org/tiny"), loaded(run, "org/tiny", ', revision="dev"')
    assert main[1] == loaded(run, bundle.path)[1]
    assert dev[1] == loaded(run, other)[1]
    assert main[1] != dev[1]
    done = run("generate", "org/tiny", "--revision", "dev", "--prompt", "x", "-q")
    assert done.returncode == 0, done.stderr
    done = run("generate", "org/tiny", "--revision", "none", "--prompt", "x")
    assert last_line(done) == "error: org/tiny: the hub has no revision 'none' of it"


@pytest.mark.slow
def test_a_plan_of_the_hub_is_not_trusted(hub, run, tmp_path):
    bundle, _ = bundle_with_plan(tmp_path, plugin="beside")
    assert run("push", bundle.path, "org/plan").returncode == 0
    done = run("generate", "org/plan/engine.plan", "--prompt", "x")
    assert "is code, and brings the library" in last_line(done)
    loaded(run, "org/plan")  # its graph is
    done = run("generate", "org/plan/engine.plan", "--prompt", "x", "--trust-plan")
    assert "is code" not in last_line(done)


@pytest.mark.slow
def test_a_model_of_the_hub_is_exported_from_its_cache_with_its_licence(hub, run, tmp_path):
    source = save_llama(tmp_path / "m", num_hidden_layers=1)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    card = b"---\nlicense: mit\n---\nwords of theirs\n"
    hub.repositories["org/model"] = Repository(False)
    more = {"README.md": card, "LICENSE": b"terms", "train.py": b"no", "big.gguf": b"no"}
    commit = hub.repositories["org/model"].commit("main", files | more)
    done = run(
        "from lminf_export import export\n"
        "bundle = export('org/model', 'b', window_size=11)\n"
        "print(bundle.manifest.source.name, bundle.manifest.source.revision)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["org/model", commit]
    text = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"' in text
    assert 'base_model: "org/model"' in text
    assert "words of theirs" not in text
    assert (tmp_path / "b" / "LICENSE").read_bytes() == b"terms"
    assert not [line for line in hub.requests if "train.py" in line or "gguf" in line]


@pytest.mark.slow
def test_of_a_repository_of_gguf_files_one_is_to_be_fetched(hub, run):
    files = {"m-q4_0.gguf": b"GGUF", "m-q8_0.gguf": b"GGUF", "README.md": b"words"}
    hub.repositories["org/gguf"] = Repository(False)
    hub.repositories["org/gguf"].commit("main", files)
    done = run("from lminf_export import export\nexport('org/gguf', 'b')")
    line = last_line(done)
    assert "model 'org/gguf' holds GGUF files on the hub, and no safetensors" in line
    assert "`hf download org/gguf m-q4_0.gguf --local-dir .`" in line
    assert not [request for request in hub.requests if request.endswith(".gguf")]


@pytest.mark.slow
def test_of_a_repository_of_onnx_models_one_is_to_be_fetched(hub, run, tmp_path):
    files = {"onnx/decoder.onnx": b"x", "onnx/model.onnx": b"x", "tokenizer.json": b"{}"}
    hub.repositories["org/onnx"] = Repository(False)
    hub.repositories["org/onnx"].commit("main", files)
    export = "from lminf_export import export\nexport('org/onnx', 'b', cache_dir='cache')"
    words = (
        "model 'org/onnx' holds ONNX models on the hub, and no safetensors",
        "given as a local folder",
        '`hf download org/onnx --include "onnx/model.onnx*" --include "*.json" --include "*.jinja"',
    )
    line = last_line(run(export))
    assert all(word in line for word in words)
    # Without a network the cache's own files say it.
    (snapshot,) = tmp_path.rglob("snapshots/*")
    (snapshot / "onnx").mkdir()
    (snapshot / "onnx" / "model.onnx").write_bytes(b"x")
    line = last_line(run(export, HF_HUB_OFFLINE="1"))
    assert all(word in line for word in words)


@pytest.mark.slow
def test_what_cannot_be_fetched_is_one_line(hub, run, bundle):
    done = run("generate", "org/none", "--prompt", "x")
    assert "org/none: no such folder here, and the hub does not know it" in last_line(done)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    done = run("generate", "org/none", "--prompt", "x", HF_HUB_OFFLINE="1")
    assert "the hub could not be reached" in last_line(done)
    done = run("push", bundle.path, "org/new", HF_TOKEN="hf_wrong")
    assert last_line(done).startswith("error: org/new: ")
    assert len(done.stderr.strip().splitlines()) == 1
    done = run("push", bundle.path, "not an id")
    assert "is not the id of a repository" in last_line(done)


def test_a_model_on_the_hub_is_no_bundle(hub, run):
    hub.repositories["org/model"] = Repository(False)
    hub.repositories["org/model"].commit("main", {"config.json": b"{}"})
    done = run("generate", "org/model", "--prompt", "x")
    assert "holds no bundle: it has no lminf.json" in last_line(done)
    assert len(last_line(done)) <= 300


def test_a_hub_that_is_down_is_one_line(run, bundle):
    for words in (("generate", "org/x", "--prompt", "x"), ("push", bundle.path, "org/x")):
        done = run(*words, HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_what_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for path in ("org/name", "name", "./a/b", "/a/b", "a/b/", tmp_path / "org"):
        assert find_bundle(path) == type(tmp_path)(path)
    with pytest.raises(BundleError, match="is local"):
        find_bundle("org/name", revision="main")
