"""Models that bring Python of their own: with the flag they are exported, without it none runs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lminf_export import ModelError, export, load
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.cli.export import export_command
from lminf_export.cli.main import cli
from lminf_export.models.remote_code import new_model
from tests.support.hub_code import MARKER, STYLES, edit_modeling, save_hub_model

WINDOW = 32
SETTINGS = {"window_size": WINDOW, "num_sink_tokens": 4, "chunk_size": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return style → folder of a model, each made once."""
    folder, made = tmp_path_factory.mktemp("hub"), {}

    def get(style):
        if style not in made:
            made[style] = save_hub_model(folder / style, style)
        return made[style]

    return get


def stock_logits(folder, tokens):
    source = open_source(folder, trust_remote_code=True)
    model = load_model(open_checkpoint(source), torch.float32, "eager")
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_code_of_a_repository_is_exported_with_the_flag(style, models, tmp_path):
    bundle = export(models(style), tmp_path / "b", trust_remote_code=True, **SETTINGS)
    assert "passed the probe" in " ".join(bundle.manifest.notices)
    heads = STYLES[style][2].get("num_key_value_heads", 2)
    assert {layer.num_kv_heads for layer in bundle.manifest.layer_specs} == {heads}
    tokens = np.random.default_rng(3).integers(3, 97, WINDOW)
    model = load(bundle.path)
    found = model.forward(tokens[None], model.new_state())[0]
    wanted = stock_logits(models(style), tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.ptp(wanted)
    command = ["validate", str(bundle.path), "--trust-remote-code"]
    for own in ([], ["--model", str(models(style))]):
        result = CliRunner().invoke(cli, [*command, *own])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("style", STYLES)
def test_without_the_flag_nothing_of_a_repository_runs(style, models, tmp_path, monkeypatch):
    folder, marker = models(style), tmp_path / "marker"
    monkeypatch.setenv(MARKER, str(marker))
    forget_code()
    with pytest.raises(ModelError, match="--trust-remote-code runs it"):
        export(folder, tmp_path / "b", **SETTINGS)
    assert not marker.exists()
    assert not (tmp_path / "b").exists()
    forget_code()
    open_source(folder, trust_remote_code=True)
    new_model(open_source(folder, trust_remote_code=True).config)
    assert marker.exists()


def test_code_beside_a_model_that_transformers_knows_runs_with_the_flag_only(
    models, tmp_path, monkeypatch
):
    """A repository of a known type may bring code too; what was agreed to once is not kept."""
    folder, marker = tmp_path / "m", tmp_path / "marker"
    save_hub_model(folder, "subclass", num_nextn_predict_layers=1)
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"].pop("AutoConfig")
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "qwen2"}))
    monkeypatch.setenv(MARKER, str(marker))
    for trusts in (False, True, False):
        forget_code()
        marker.unlink(missing_ok=True)
        source = open_source(folder, trust_remote_code=trusts)
        name = type(new_model(source.config)).__name__
        assert name == ("HubForCausalLM" if trusts else "Qwen2ForCausalLM")
        assert marker.exists() == trusts


def forget_code():
    """Let the next use of a repository's code import it again."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]


@pytest.mark.slow
def test_the_bundle_carries_the_code_and_does_not_run_it(models, tmp_path, monkeypatch):
    bundle = export(models("interface"), tmp_path / "b", trust_remote_code=True, **SETTINGS)
    assert bundle.manifest.files["modeling_hub.py"].role == "config"
    marker = tmp_path / "marker"
    monkeypatch.setenv(MARKER, str(marker))
    forget_code()
    runner = CliRunner()
    assert runner.invoke(cli, ["inspect", str(bundle.path)]).exit_code == 0
    refused = runner.invoke(cli, ["validate", str(bundle.path)])
    assert refused.exit_code == 2
    assert "--trust-remote-code runs it" in refused.output
    assert not marker.exists()


OLD = "raise ImportError(\"cannot import name 'gone' from 'transformers'\")\n"


def test_code_that_fails_is_named_with_its_reason(tmp_path):
    folder = save_hub_model(tmp_path / "m", "interface")
    edit_modeling(folder, "import math\n", OLD)
    with pytest.raises(ModelError, match="the repository's own code of this hub_style model fails"):
        export(folder, tmp_path / "b", trust_remote_code=True, **SETTINGS)


@pytest.mark.parametrize(
    ("style", "old", "new", "reason"),
    [
        # Keys that are not multiplied by queries, but subtracted: no attention that is known.
        (
            "written_out",
            "torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)",
            "-torch.cdist(query, key)",
            "attention of its own",
        ),
        (
            "written_out",
            "mask = torch.triu(mask, diagonal=1)",
            "mask = (torch.triu(mask, diagonal=1) + torch.tril(mask, diagonal=-3))",
            "already inside the window",
        ),
        (
            "written_out",
            "query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)\n",
            "query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)\n"
            "        key = key * (1 + position_ids[:, None, :, None] / 10)\n",
            "attention temperature|attention of its own",
        ),
    ],
)
def test_code_that_attends_in_another_way_is_refused(style, old, new, reason, tmp_path):
    folder = save_hub_model(tmp_path / "m", style)
    edit_modeling(folder, old, new)
    with pytest.raises(ModelError, match=reason) as caught:
        export(folder, tmp_path / "b", trust_remote_code=True, **SETTINGS)
    assert len(str(caught.value)) <= 300
    assert not (tmp_path / "b").exists()


def test_the_flag_is_an_option_of_every_command_that_builds_a_model():
    runner = CliRunner()
    for command in (["validate"], ["eval", "perplexity"]):
        assert "--trust-remote-code" in runner.invoke(cli, [*command, "--help"]).output
    assert "--trust-remote-code" in runner.invoke(export_command, ["--help"]).output
