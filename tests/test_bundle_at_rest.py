"""Bundles while they are replaced: killed at any moment, cleared, and reached through links."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lminf_export.bundle import destination as destination_module
from lminf_export.bundle import exchange as exchange_module
from lminf_export.bundle import writer as writer_module
from lminf_export.bundle.exchange import exchange
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.records import SourceRecord
from lminf_export.bundle.writer import BundleWriter
from lminf_export.checkpoint.source import open_source
from lminf_export.engine.add_plan import add_plan
from lminf_export.errors import BundleError, EngineError, ExportError, ModelError
from lminf_export.export.run import export
from lminf_export.runtime.load import load
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

TINY = TinyModel()
POINTS = 120


class Other(TinyModel):
    """A bundle that can be told from the first."""

    def manifest(self, engine=None):
        source = SourceRecord(name="somebody/new")
        return super().manifest(engine).model_copy(update={"source": source})


def killed(first, second, kind, folder, points):
    """What stood at the destination after a kill at each of so many points, counted."""
    folder.mkdir()
    words = [sys.executable, "-m", "tests.support.crash_points"]
    done = subprocess.run(
        [*words, str(first), str(second), kind, str(folder), str(points)],
        check=True,
        capture_output=True,
        text=True,
    )
    return Counter(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exchange", "two-steps"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new_bundle_whole(tmp_path, kind):
    if kind == "exchange" and not can_exchange(tmp_path):
        pytest.skip("this kernel or filesystem cannot exchange two folders")
    first, second = TINY.write(tmp_path / "old").path, Other().write(tmp_path / "new").path
    found = killed(first, second, kind, tmp_path / "work", POINTS)
    whole = {"somebody/tiny", "somebody/new"}
    if kind == "exchange":
        assert found.keys() == whole, found
    else:  # one moment has neither, and says which folder to move back
        odd = [text for text in found if text not in whole]
        assert all("killed while it replaced it; mv " in text for text in odd), found
    assert sum(found.values()) == POINTS
    assert found["somebody/new"] >= 2


def test_two_folders_change_places(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this kernel or filesystem cannot exchange two folders")
    assert os.listdir(tmp_path / "a") == ["b"]
    assert os.listdir(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "missing")


def can_exchange(folder):
    (folder / "x").mkdir()
    (folder / "y").mkdir()
    return exchange(folder / "x", folder / "y")


def test_a_system_without_the_call_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange_module.sys, "platform", "plan9")
    assert not exchange(tmp_path, tmp_path)


def test_a_replacement_without_the_call_works_too(tmp_path, monkeypatch):
    path = TINY.write(tmp_path / "b").path
    monkeypatch.setattr(writer_module, "exchange", lambda left, right: False)
    Other().write(path, force=True)
    assert Bundle.open(path, "full").manifest.source.name == "somebody/new"
    assert os.listdir(tmp_path) == ["b"]


def test_a_bundle_that_was_moved_away_is_named_and_comes_back(tmp_path):
    path = TINY.write(tmp_path / "b").path
    moved = path.rename(tmp_path / ".b.replaced-0123abcd")
    with pytest.raises(BundleError, match=rf"does not exist: .* mv {moved} back"):
        Bundle.open(path)
    with pytest.raises(ExportError, match="--force"):
        BundleWriter(path).__enter__()
    Bundle.open(path, "full")


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_a_hidden_folder_of_an_export_never_loads_however_whole_it_is(tmp_path, kind, monkeypatch):
    hidden = TINY.write(tmp_path / "b").path.rename(tmp_path / f".b.{kind}-0123abcd")
    link = tmp_path / "link"
    link.symlink_to(hidden)
    monkeypatch.chdir(hidden)
    for path in (hidden, hidden / "model.onnx", link, "."):
        with pytest.raises(BundleError, match="is not a bundle: an export"):
            load(path)


def test_a_folder_that_others_hold_is_not_cleared_and_one_that_is_cleared_is_made_again(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        path = writer.add("model.onnx", "graph")
        with BundleWriter(tmp_path / "b"):
            assert path.parent.is_dir()
    real, taken = destination_module.locked, []

    def steal(folder):
        if not taken:
            taken.append(folder)
            folder.rmdir()
        return real(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destination_module, "locked", steal)
        TINY.write(tmp_path / "b")
    assert len(taken) == 1
    assert os.listdir(tmp_path) == ["b"]


def test_another_process_that_fills_the_destination_keeps_it(tmp_path, monkeypatch):
    real = os.rename

    def rename(source, target):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "precious").touch()
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ExportError, match="was filled by another process"):
        TINY.write(tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["precious"]


def in_the_hubs_layout(folder, cache):
    """Put a folder's files where `snapshot_download` puts them; return the snapshot."""
    blobs, snapshot = cache / "models--o--n" / "blobs", cache / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / f"{index:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{index:064x}")
    return snapshot


def test_the_hubs_cache_layout_loads_and_can_be_watched(tmp_path):
    plain = TINY.write(tmp_path / "b").path
    snapshot = in_the_hubs_layout(plain, tmp_path / "cache")
    found = []
    for path in (plain, snapshot):
        model = load(path, threads=1)
        seen = []
        session = model.session.watch(["attention_0"], seen.append)
        state = session.new_state(1)
        logits = session.step(state, *map(as_ids, ([[1]], [1], [[0]])))
        found.append((logits.copy(), seen[0]["attention_0"]))
    for plain_values, linked_values in zip(*found, strict=True):
        assert (plain_values == linked_values).all()


def test_a_bundle_in_a_folder_of_a_repository_loads_from_that_layout(tmp_path):
    snapshot = in_the_hubs_layout(TINY.write(tmp_path / "b").path, tmp_path / "cache")
    inner = snapshot / "onnx"
    inner.mkdir()
    for link in [path for path in snapshot.iterdir() if path.is_symlink()]:
        (inner / link.name).symlink_to(f"../../../blobs/{link.resolve().name}")
        link.unlink()
    load(inner, threads=1)


def as_ids(values):
    import numpy as np

    return np.array(values, np.int64)


@pytest.mark.parametrize("name", ["model.onnx.data", "lminf.json", "tokenizer.json"])
def test_a_bundle_in_that_layout_with_a_link_elsewhere_is_refused(tmp_path, name):
    snapshot = in_the_hubs_layout(TINY.write(tmp_path / "b").path, tmp_path / "cache")
    blob = (snapshot / name).resolve()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=rf"{name} is a link to outside"):
        Bundle.open(snapshot)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "m", num_hidden_layers=2)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_whose_file_leads_out_of_its_folder_is_refused(model_folder, tmp_path, name):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    secret = tmp_path / "secret"
    if (folder / name).is_file():
        (folder / name).rename(secret)
    else:
        secret.write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(ModelError, match=rf"{name} in model folder 'm' is a link to outside"):
        export(folder, tmp_path / "b", window_size=11)
    assert not (tmp_path / "b").exists()


def test_links_to_nothing_in_circles_and_of_folders_are_refused_hidden_ones_are_not(
    model_folder, tmp_path
):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    (folder / ".git").symlink_to("/")
    assert open_source(folder).model_type == "llama"
    for name, target in (("a.json", "/none"), ("b", "b"), ("templates", "/"), ("c.x", "../c")):
        (folder / name).symlink_to(target)
        with pytest.raises(ModelError, match=rf"{name} in model folder 'm' is a link to outside"):
            open_source(folder)
        (folder / name).unlink()


@pytest.mark.slow
def test_links_within_a_model_folder_and_the_hubs_layout_are_read(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "m"))
    (folder / "real").mkdir()
    (folder / "config.json").rename(folder / "real" / "config.json")
    (folder / "config.json").symlink_to("real/config.json")
    assert open_source(folder).model_type == "llama"
    snapshot = in_the_hubs_layout(model_folder, tmp_path / "cache")
    bundle = export(snapshot, tmp_path / "b", window_size=11, weights="link")
    assert (bundle.path / "model.safetensors").is_file()


def plan_bytes(version):
    return struct.pack("<4sI16x4B", b"ftrt", 0, *version) + b"and so on"


@pytest.fixture
def with_plan(model_folder, tmp_path):
    bundle = export(model_folder, tmp_path / "e", window_size=11, chunk_size=7, builder="none").path
    library, plan = tmp_path / "some.so", tmp_path / "old.plan"
    library.write_bytes(b"\x7fELF getCreators LambdaAttention")
    plan.write_bytes(plan_bytes((10, 4, 0, 1)))
    return add_plan(bundle, plan, target="sm_90", plugin=library).path


@pytest.mark.slow
def test_a_kill_while_a_plan_is_replaced_leaves_a_bundle(with_plan, tmp_path):
    plan = tmp_path / "new.plan"
    plan.write_bytes(plan_bytes((10, 5, 0, 1)))
    found = killed(with_plan, plan, "add", tmp_path / "work", POINTS)
    assert found.keys() <= {"10.4.0.1", "none", "10.5.0.1"}, found
    assert found["10.4.0.1"]


@pytest.mark.slow
def test_two_plans_are_not_added_at_once(with_plan, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    plan = tmp_path / "new.plan"
    plan.write_bytes(plan_bytes((10, 5, 0, 1)))
    descriptor = os.open(with_plan, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(EngineError, match="another process adds a plan"):
            add_plan(with_plan, plan, target="sm_90", force=True)
    finally:
        os.close(descriptor)
