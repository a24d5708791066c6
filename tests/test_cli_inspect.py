"""`lminf inspect`: what a bundle holds, what its cache costs, for people and for programs."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from lminf_export import export
from lminf_export.bundle.records import Engine
from lminf_export.bundle.writer import BundleWriter
from lminf_export.cli.main import cli
from lminf_export.runtime.kernels import find_kernels
from tests.support.tensorrt_doubles import bundle_with_plan
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

QDQ = {"quantize": "int4", "builder": "none", "out": "engine.plan"}
TINY = TinyModel(sliding_window=5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    engine = Engine(
        builder="tensorrt-rtx",
        version="1.7.1",
        target="any",
        file="x.plan",
        dtype="float32",
        profiles=({"batch": (1, 1, 4), "sequence": (1, 1, 1)},),
    )
    path = tmp_path_factory.mktemp("b") / "tiny"
    with BundleWriter(path) as writer:
        writer.add("model.onnx", "graph").write_bytes(b"graph")
        writer.add("x.plan", "plan").write_bytes(b"plan")
        writer.commit(TINY.manifest(engine))
    return path


def inspect(*arguments):
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], env={"COLUMNS": "100"})


def test_people_see_model_cache_engine_and_files(bundle):
    result = inspect(bundle)
    assert result.exit_code == 0, result.output
    for text in (
        "somebody/tiny at main",
        "unknown: the graph cannot be read",
        "1 × Λ, 2 key/value heads of 6, ring of 21",
        "1 × sliding window, 2 key/value heads of 6, ring of 14",
        "3.6 KiB, without end",
        "a full cache at 32k tokens",
        "3.0 MiB",
        "a full cache at 1M tokens",
        "91.6 MiB",
        "x.plan, float32, built, not executed here",
        "tensorrt-rtx 1.7.1, for any",
        "batch 1…4, sequence 1…1",
        "rings updated in place, sinks in two buffers",
        "model.onnx",
        "a model made by hand",
    ):
        assert text in result.output, text


@pytest.mark.parametrize(
    ("options", "how"), [({}, "declared"), ({"cache_aliasing": "bound"}, "bound")]
)
def test_how_a_plugin_updates_caches_is_no_claim_that_it_does(tmp_path, options, how):
    opened, _ = bundle_with_plan(tmp_path, plugin="beside", **options)
    shown = " ".join(inspect(opened.path).output.replace("│", " ").split())
    assert f"engine caches {how} as updated in place; lminf bench on its GPU shows" in shown


def test_programs_get_the_manifest_and_the_costs(bundle):
    content = json.loads(inspect(bundle, "--json").output)
    assert content["manifest"]["lambda_config"]["window_size"] == TINY.window_size
    manifest = TINY.manifest()
    assert content["cache"]["bytes_per_sequence"] == manifest.cache_bytes_per_sequence
    assert content["cache"]["full_cache_bytes"] == {
        "32k": manifest.full_cache_bytes(32768),
        "1M": manifest.full_cache_bytes(1_000_000),
    }


def test_it_says_which_kernels_auto_would_load(bundle, monkeypatch, tmp_path):
    """A bundle carries none: what `auto` takes is the machine's."""
    found = find_kernels("auto", "cpu")
    choice = json.loads(inspect(bundle, "--json").output)["kernels"]
    assert choice["library"] == (str(found.path) if found else None)
    words = " ".join(inspect(bundle).output.replace("│", " ").split())  # cells are wrapped
    assert "none in the bundle" in words
    if found is not None:
        assert choice["instruction_set"] == found.instruction_set
        assert f"takes {found.path.name} ({found.instruction_set})" in words
    monkeypatch.setattr("lminf_export.cli.inspect.INSTALLED", tmp_path / "liblminf_ort.so")
    assert "none installed" in inspect(bundle).output
    assert json.loads(inspect(bundle, "--json").output)["kernels"]["library"] is None
    (tmp_path / "liblminf_ort.so").write_bytes(b"no library")
    broken = inspect(bundle)
    assert broken.exit_code == 0, "what is wrong with the machine does not hide the bundle"
    assert "--kernels auto fails" in broken.output


def test_a_damaged_bundle_is_one_line(tmp_path):
    path = TINY.write(tmp_path / "b").path
    (path / "model.onnx").write_bytes(b"")
    result = inspect(path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.sampled
@pytest.mark.parametrize("settings", [{}, {"quantize": "int4"}, {"quantize": "int8"}, QDQ])
@pytest.mark.parametrize("ties", [True, False])
def test_parameters_are_the_models_whatever_form_they_have(ties, settings, tmp_path):
    model = save_llama(tmp_path / "m", tie_word_embeddings=ties)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    settings = dict(settings)
    out = tmp_path / "b" / settings.pop("out", "")
    export(model, out, window_size=8, **settings)
    wanted = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    content = json.loads(inspect(tmp_path / "b", "--json").stdout)
    assert content["parameters"] == wanted
    assert content["chat_template"] == "chat_template.jinja"
    reads = content["bytes_per_token"]
    assert 0 < reads["cache"] < content["cache"]["bytes_per_sequence"]
    table = 0 if ties else AutoConfig.from_pretrained(model)
    if not settings:
        unread = 0 if ties else table.vocab_size * table.hidden_size - table.hidden_size
        assert reads["weights"] == 4 * (wanted - unread)
    shown = inspect(tmp_path / "b").stdout
    assert f"{wanted:,}" in shown
    assert "chat_template.jinja" in shown
