"""Bundles: where they go, that they appear whole or not at all, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import content_sha256
from lminf_export.bundle.out import OutTarget, parse_out
from lminf_export.bundle.records import MANIFEST_NAME, Engine, SourceRecord
from lminf_export.bundle.writer import BundleWriter
from lminf_export.errors import BundleError, ExportError
from tests.support.signals import default_signals
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return TINY.write(tmp_path_factory.mktemp("bundles") / "tiny").path


@pytest.fixture
def bundle_path(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("out", OutTarget(Path("out"))),
        ("a/b/out/", OutTarget(Path("a/b/out"))),
        ("llama-3.1-8b", OutTarget(Path("llama-3.1-8b"))),
        ("out-3.1", OutTarget(Path("out-3.1"))),
        ("Qwen2.5-7B", OutTarget(Path("Qwen2.5-7B"))),
        ("mistral-v0.3", OutTarget(Path("mistral-v0.3"))),
        ("out.xyz/", OutTarget(Path("out.xyz"))),
        ("engine.plan", OutTarget(Path("engine"), engine_name="engine.plan")),
        ("./engine.plan", OutTarget(Path("engine"), engine_name="engine.plan")),
        ("llama-3.1.plan", OutTarget(Path("llama-3.1"), engine_name="llama-3.1.plan")),
        ("dir/x.plan", OutTarget(Path("dir"), engine_name="x.plan")),
        ("d.xyz/x.plan", OutTarget(Path("d.xyz"), engine_name="x.plan")),
        ("dir/graph.onnx", OutTarget(Path("dir"), graph_name="graph.onnx")),
        ("graph.onnx", OutTarget(Path("graph"), graph_name="graph.onnx")),
    ],
)
def test_out_names_a_folder_or_its_last_product(out, expected):
    assert parse_out(out) == expected
    if not out.endswith("/"):
        assert parse_out(Path(out)) == expected


@pytest.mark.parametrize("out", ["out.xyz", "a/model.engine", "m.trt", "x.bin", "x.pt", "x.ONNX"])
def test_an_unknown_file_type_is_refused_by_name(out):
    with pytest.raises(ExportError, match=rf"{Path(out).suffix} file"):
        parse_out(out)


@pytest.mark.parametrize("out", ["", "  "])
def test_an_empty_out_is_refused(out):
    with pytest.raises(ExportError, match="must name a folder"):
        parse_out(out)


def test_a_written_bundle_opens_as_folder_and_by_any_file_in_it(bundle_path):
    for path in (bundle_path, str(bundle_path), bundle_path / "model.onnx"):
        bundle = Bundle.open(path, verify="full")
        assert bundle.path == bundle_path
        assert bundle.manifest == Bundle.open(bundle_path / MANIFEST_NAME).manifest
    assert bundle.manifest.settings == TINY.settings
    assert bundle.manifest.layer_specs == TINY.layers
    assert bundle.graph_path.is_file()
    assert bundle.tokenizer_path == bundle_path / "tokenizer.json"
    assert bundle.plan_path is None


def test_a_folder_readable_for_others_follows_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        path = TINY.write(tmp_path / "out").path
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o755


def broken_off(directory, error, force=False):
    """An export that fails after a KiB of its graph."""
    with BundleWriter(directory, force=force) as writer:
        writer.add("model.onnx", "graph").write_bytes(bytes(1024))
        raise error


def test_missing_parents_are_made_and_taken_away_again_on_failure(tmp_path):
    with pytest.raises(RuntimeError):
        broken_off(tmp_path / "a" / "b" / "out", RuntimeError())
    assert list(tmp_path.iterdir()) == []
    TINY.write(tmp_path / "a" / "b" / "out")
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_export_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        broken_off(tmp_path / "out", error())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_bundle(bundle_path):
    with pytest.raises(KeyboardInterrupt):
        broken_off(bundle_path, KeyboardInterrupt(), force=True)
    Bundle.open(bundle_path, verify="full")
    assert os.listdir(bundle_path.parent) == [bundle_path.name]


_EXPORT_AND_WAIT = """
import sys, time
from lminf_export.bundle.writer import BundleWriter
with BundleWriter(sys.argv[1]) as writer:
    writer.add("model.onnx", "graph").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def interrupted_export(out, number):
    process = subprocess.Popen(
        [sys.executable, "-c", _EXPORT_AND_WAIT, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.wait(timeout=30)
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path, number):
    interrupted_export(tmp_path / "out", number)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_loads_and_the_next_one_clears_it(tmp_path):
    interrupted_export(tmp_path / "out", signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(left)
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "out")
    TINY.write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_under_way_is_not_cleared_by_another(tmp_path):
    with BundleWriter(tmp_path / "out") as first:
        path = first.add("model.onnx", "graph")
        path.write_bytes(b"half")
        with BundleWriter(tmp_path / "out"):
            pass
        assert path.read_bytes() == b"half"


def test_an_existing_folder_that_is_no_bundle_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("thesis")
    for force in (False, True):
        with pytest.raises(ExportError, match="is not a bundle; nothing was touched"):
            BundleWriter(tmp_path / "out", force=force).__enter__()
    assert (tmp_path / "out" / "precious").read_text() == "thesis"
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file"):
        BundleWriter(tmp_path / "file", force=True).__enter__()
    with pytest.raises(ExportError, match="is not a folder"):
        BundleWriter(tmp_path / "file" / "out").__enter__()


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    TINY.write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_the_current_folder_is_not_replaced_under_the_users_feet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="is the current folder"):
        BundleWriter(".").__enter__()


def test_an_existing_bundle_is_replaced_only_by_force(bundle_path):
    (bundle_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(ExportError, match="--force"):
        BundleWriter(bundle_path).__enter__()
    TINY.write(bundle_path, force=True)
    Bundle.open(bundle_path, verify="full")
    assert os.listdir(bundle_path.parent) == [bundle_path.name]


def test_a_failed_replacement_in_two_steps_puts_the_old_bundle_back(bundle_path, monkeypatch):
    monkeypatch.setattr("lminf_export.bundle.writer.exchange", lambda left, right: False)
    real = os.rename

    def rename(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        TINY.write(bundle_path, force=True)
    monkeypatch.undo()
    Bundle.open(bundle_path, verify="full")
    assert os.listdir(bundle_path.parent) == [bundle_path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_with_numbers(tmp_path, number):
    with pytest.raises(ExportError, match=r"no space left .*1\.0 KiB were written .* are free"):
        broken_off(tmp_path / "out", OSError(number, os.strerror(number)))
    assert list(tmp_path.iterdir()) == []


def test_missing_space_is_noticed_before_writing(tmp_path):
    with (
        pytest.raises(ExportError, match=r"it needs 8\.0 EiB|it needs .*PiB, .* are free"),
        BundleWriter(tmp_path / "out") as writer,
    ):
        writer.require_space(2**63)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../b", ".", "", "a\\b", "lminf.json", "a//b", "./a", "a\0"]
)
def test_file_names_stay_inside_the_bundle(tmp_path, name):
    with pytest.raises(ExportError, match="not a plain"), BundleWriter(tmp_path / "o") as writer:
        writer.add(name, "other")


@pytest.mark.parametrize("name", ["/home/me/llama", "~/llama", "..", "a/../b", "C:\\llama", ""])
def test_the_source_is_never_a_path_of_this_machine(name):
    with pytest.raises(ValidationError, match="neither a model id"):
        SourceRecord(name=name)


def test_fast_opening_notices_a_changed_graph_and_a_truncated_weight_file(bundle_path):
    weights = bundle_path / "model.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=rf"has {len(content) - 1} bytes, .* {len(content)}"):
        Bundle.open(bundle_path)
    weights.write_bytes(b"\1" + content[1:])
    Bundle.open(bundle_path)
    with pytest.raises(BundleError, match=r"model\.onnx\.data was altered: its SHA-256"):
        Bundle.open(bundle_path, verify="full")
    weights.write_bytes(content)
    graph = bundle_path / "model.onnx"
    altered = bytearray(graph.read_bytes())
    altered[len(altered) // 2] ^= 1
    graph.write_bytes(altered)
    with pytest.raises(BundleError, match=r"model\.onnx was altered"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_missing_file_is_named(bundle_path, name):
    (bundle_path / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing"):
        Bundle.open(bundle_path)


def test_a_link_to_outside_is_refused(bundle_path, tmp_path):
    weights = bundle_path / "model.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link to outside"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("\xff", "is damaged|schema version"),
        ("[]", "schema version None"),
        ('{"schema_version": 2}', "schema version 2, this lminf-export reads 1"),
        ('{"schema_version": "1"}', "schema version '1'"),
        ('{"schema_version": true}', "schema version True"),
        ('{"schema_version": 1}', "was altered"),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(bundle_path, text, message):
    (bundle_path / MANIFEST_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_path)


def rewritten(bundle_path, change):
    """Change the manifest and seal it again, as a careful forger would."""
    path = bundle_path / MANIFEST_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    fields["manifest_sha256"] = content_sha256(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")


def set_at(*keys):
    *path, last, value = keys

    def change(fields):
        for key in path:
            fields = fields[key]
        fields[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("vocab_size", "257"), "vocab_size: Input should be a valid integer"),
        (set_at("vocab_size", 258), "outputs: entry 0 is logits .*257.*, the layers ask for"),
        (set_at("surprise", 1), "surprise: Extra inputs"),
        (set_at("inputs", 0, "dtype", "int32"), "inputs: entry 0 is input_ids int32"),
        (set_at("inputs", 4, "shape", ["batch", 2, "ring", 6]), "inputs: entry 4"),
        (set_at("layers", 0, "window_size", 99), "window_size=99: lambda_config has"),
        (set_at("lambda_config", "num_sink_tokens", -1), "num_sink_tokens=-1"),
        (set_at("dtype", "float64"), "dtype: Input should be"),
        (set_at("source", "name", "/home/x"), "neither a model id"),
        (set_at("graph", "../model.onnx"), "not a plain relative"),
        (set_at("graph", "other.onnx"), "names other.onnx as its graph"),
        (set_at("max_position", 2**41), "max_position"),
        (set_at("layers", []), "layers"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_by_name(bundle_path, change, message):
    rewritten(bundle_path, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_path)


def test_a_manifest_changed_by_hand_is_noticed(bundle_path):
    path = bundle_path / MANIFEST_NAME
    path.write_text(path.read_text(encoding="utf-8").replace("somebody", "nobody_at"))
    with pytest.raises(BundleError, match="does not match its own manifest_sha256"):
        Bundle.open(bundle_path)


def test_a_path_without_a_bundle_says_what_is_missing(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no lminf\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.open(tmp_path / ("x" * 300))


def test_an_engine_is_found_and_must_be_listed(tmp_path):
    engine = Engine(
        builder="tensorrt-rtx",
        version="1.7",
        target="any",
        file="x.plan",
        dtype="float32",
        profiles=({"batch": (1, 1, 1), "sequence": (1, 1, 1)},),
    )
    with BundleWriter(tmp_path / "out") as writer:
        writer.add("model.onnx", "graph").write_bytes(b"graph")
        writer.add("x.plan", "plan").write_bytes(b"plan")
        written = writer.commit(TINY.manifest(engine))
    bundle = Bundle.open(tmp_path / "out" / "x.plan")
    assert bundle.plan_path == tmp_path / "out" / "x.plan"
    assert bundle.manifest == written
    assert bundle.manifest.engine.note == "built, not executed here"
    (tmp_path / "out" / "x.plan").write_bytes(b"nalp")
    with pytest.raises(BundleError, match=r"x\.plan was altered"):
        Bundle.open(tmp_path / "out")


def test_full_cache_grows_with_length_and_the_bounded_one_does_not():
    tiny = TinyModel(sliding_window=5)
    manifest = tiny.manifest()
    per_token = 2 * tiny.num_kv_heads * tiny.head_dim * 4
    # One Λ layer keeps every token, one sliding layer its window.
    assert manifest.full_cache_bytes(1000) == per_token * (1000 + 5)
    first, last = tiny.layers
    slots = first.ring_capacity + tiny.num_sink_tokens + last.ring_capacity
    assert manifest.cache_bytes_per_sequence == per_token * slots


def test_reading_a_manifest_needs_no_torch():
    code = "import sys, lminf_export.bundle.folder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"), (2**50, "1.0 PiB")],
)
def test_sizes_are_written_as_people_do(count, text):
    assert human_bytes(count) == text


def test_hashing_reports_progress(bundle_path):
    seen = {}
    Bundle.open(
        bundle_path,
        verify="full",
        progress=lambda name, n: seen.__setitem__(name, seen.get(name, 0) + n),
    )
    files = Bundle.open(bundle_path).manifest.files
    assert seen == {name: entry.bytes for name, entry in files.items()}
