"""Every family: equal to stock transformers inside the window, to an oracle far beyond it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.support.families import CASES, CHUNK, SINKS, SIZES, SLIDING, WINDOW, FamilyCase
from benchmarks.support.family_check import (
    TOLERANCE,
    export_family,
    measure_family,
    stock_error,
)
from lminf_export import ConfigError, LambdaConfig, ModelError, export, load
from lminf_export.cli.export import export_command
from lminf_export.models.probe import ProbedFamily
from lminf_export.models.registry import FAMILIES, find_family
from tests.support.family_bundles import family_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_family_equals_stock_inside_the_window_and_the_oracle_beyond(case, made_once):
    errors = measure_family(case, family_folder(made_once, case))
    assert errors.stock < TOLERANCE
    assert errors.token_by_token < TOLERANCE
    assert errors.in_chunks < TOLERANCE


UNKNOWN = FamilyCase(
    "cwm",
    "",
    changes={
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": SLIDING,
    },
    windows=(None, SLIDING, SLIDING),
)


def case(model_type, **changes):
    """Return a family's case with some settings changed."""
    [found] = [case for case in CASES if case.model_type == model_type]
    return replace(found, changes={**found.changes, **changes})


def plan(config, **settings):
    settings = {"window_size": WINDOW, "num_sink_tokens": SINKS, "chunk_size": CHUNK, **settings}
    return find_family(config.model_type).plan(config, LambdaConfig(**settings))


def test_every_case_is_a_registered_family():
    assert {case.model_type for case in CASES} <= set(FAMILIES)


def test_the_table_of_models_has_a_row_for_every_family():
    page = (ROOT / "docs" / "models.md").read_text().partition("\n## ")[0]
    names = {name.partition("-")[0] for name in re.findall(r"^\| `([^`]+)` \|", page, re.M)}
    assert names == set(FAMILIES)


@pytest.mark.sampled
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_sliding_layers_may_have_sinks_within_their_own_window(model_type, tmp_path):
    export_family(case(model_type), tmp_path, "all")
    errors = measure_family(case(model_type), tmp_path, "all")
    assert max(errors.stock, errors.token_by_token, errors.in_chunks) < TOLERANCE


def test_a_model_that_slides_everywhere_says_that_no_layer_is_left():
    config = case("mistral").config()
    assert "no layer is left" in " ".join(plan(config).notices)
    assert not plan(config, lambda_layers="all").notices


def test_a_window_as_long_as_the_model_was_trained_on_is_none():
    config = case("mistral", sliding_window=64).config()
    assert [layer.num_sink_tokens for layer in plan(config).layers] == [SINKS] * 3


def test_the_command_line_takes_layers_and_regime(tmp_path):
    source = case("mistral", rope_parameters=DYNAMIC).save(tmp_path / "m")
    options = ["--window-size", "23", "--lambda-layers", "all", "--rope-regime", "long"]
    target = ["--model", str(source), "--out", str(tmp_path / "b"), "--dry-run"]
    result = CliRunner().invoke(export_command, [*target, *options])
    assert result.exit_code == 0, result.output
    assert "no layer is left" not in result.output
    assert "frozen in its long regime" in result.output


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.1],
    "long_factor": [1.0, 3.0, 5.0, 9.0, 17.0],
    "original_max_position_embeddings": 31,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
FROZEN = {
    "longrope": case(
        "phi3",
        rope_parameters=LONGROPE,
        max_position_embeddings=124,
        original_max_position_embeddings=31,
    ),
    "dynamic": case("llama", rope_parameters=DYNAMIC, max_position_embeddings=31),
}


@pytest.mark.sampled
@pytest.mark.parametrize("kind", FROZEN)
def test_the_short_regime_equals_stock_inside_the_window(kind, tmp_path):
    source = FROZEN[kind].save(tmp_path / "m")
    bundle = export(source, tmp_path / "b", window_size=WINDOW, chunk_size=CHUNK)
    assert "frozen in its short regime" in " ".join(bundle.manifest.notices)
    tokens = np.random.default_rng(1).integers(3, 131, WINDOW)
    assert stock_error(load(tmp_path / "b"), source, "eager", tokens) < TOLERANCE


@pytest.mark.parametrize("kind", FROZEN)
def test_the_long_regime_has_the_frequencies_of_stock_in_a_long_text(kind):
    config = FROZEN[kind].config()
    rotation = plan(config, rope_regime="long").rotations[0]
    model = AutoModelForCausalLM.from_config(config)
    length = 124  # four times what the model was trained on: the factor of both scalings
    with torch.no_grad():
        model(torch.full((1, length), 3), use_cache=False)
    assert torch.equal(rotation.inv_freq, model.model.rotary_emb.inv_freq)
    assert rotation.attention_factor == pytest.approx(model.model.rotary_emb.attention_scaling)


@pytest.mark.parametrize("kind", FROZEN)
def test_the_window_decides_on_the_regime_where_nobody_does(kind):
    config = FROZEN[kind].config()
    for window, regime in ((31, "short"), (32, "long")):
        found = plan(config, window_size=window)
        chosen = plan(config, window_size=window, rope_regime=regime)
        assert f"frozen in its {regime} regime" in found.notices[0]
        assert torch.equal(found.rotations[0].inv_freq, chosen.rotations[0].inv_freq)


@pytest.mark.parametrize("regime", ["short", "long"])
def test_a_rotation_with_two_factors_has_that_of_its_regime(regime):
    """Phi-3.5-MoE: cosines and sines as stock computes them in a short and in a long text."""
    rope = {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.7}
    config = case("phimoe", rope_parameters=rope, max_position_embeddings=124).config()
    rotation = plan(config, rope_regime=regime).rotations[0]
    assert rotation.attention_factor == rope[f"{regime}_mscale"]
    model = AutoModelForCausalLM.from_config(config)
    position = torch.arange(*((60, 70) if regime == "long" else (10, 20)))[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), position)
    angle = position[0, :, None] * rotation.inv_freq
    for found, wanted in ((cos, angle.cos()), (sin, angle.sin())):
        assert torch.allclose(found[0, :, :5], wanted * rotation.attention_factor, atol=1e-6)


def test_a_model_that_turns_backwards_has_negative_frequencies():
    assert plan(case("nanochat").config()).rotations[0].inv_freq.max() < 0


@pytest.mark.sampled
def test_a_temperature_that_grows_with_the_position_is_frozen_at_one(tmp_path):
    rope = case("ministral3").changes["rope_parameters"]
    rope = {**rope, "original_max_position_embeddings": 16}
    source = case("ministral3", rope_parameters=rope).save(tmp_path / "m")
    bundle = export(source, tmp_path / "b", window_size=WINDOW, chunk_size=40)
    assert any("frozen at 1" in x and "up to 16 tokens" in x for x in bundle.manifest.notices)
    model, tokens = load(bundle.path), np.random.default_rng(1).integers(3, 131, WINDOW)
    assert stock_error(model, source, "eager", tokens[:16]) < TOLERANCE
    assert stock_error(model, source, "eager", tokens) > 100 * TOLERANCE
    content = json.loads((source / "config.json").read_text())
    content["rope_parameters"]["llama_4_scaling_beta"] = 0.0
    (source / "config.json").write_text(json.dumps(content))
    assert stock_error(model, source, "eager", tokens) < TOLERANCE


def test_a_regime_is_refused_where_the_rotation_has_none():
    for config in (case("llama").config(), UNKNOWN.config()):
        with pytest.raises(ConfigError, match="rope_regime=long: the rotary embedding of this"):
            plan(config, rope_regime="long")


# What a family knows beyond the probe: weights, and a temperature that can be frozen.
PROBED = [case for case in CASES if not case.equal_in_pairs and case.model_type != "ministral3"]


@pytest.mark.parametrize("case", PROBED, ids=lambda case: case.model_type)
def test_what_is_tested_passes_the_probe(case):
    found = ProbedFamily(case.model_type).plan(case.config(), LambdaConfig(WINDOW))
    assert "passed the probe" in found.notices[-1]


WITHOUT_ROPE = {name: value for name, value in SIZES.items() if name != "rope_parameters"}
# Types that the configuration alone does not give away, and what is seen instead; those that it
# does are in test_refusals.py.
REFUSED = {
    "beam": ({}, "attention temperature"),
    "biogpt": ({}, "learned absolute positions"),
    "ctrl": ({}, "absolute positions"),
    "doge": ({}, "attention code is unlike that of the tested models"),
    "gpt_bigcode": ({}, "learned absolute positions"),
    "mimo_v2_flash": ({"num_hidden_layers": 2, "layer_types": None}, "keys and values of diff"),
    "xglm": ({}, "absolute positions"),
}


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_a_norm_after_the_rotation_needs_weights_equal_in_pairs(model_type, tmp_path):
    config = CONFIG_MAPPING[model_type](**SIZES)
    with pytest.raises(ModelError, match="in layer 0 rotation is not the last thing"):
        ProbedFamily(model_type).plan(config, LambdaConfig(WINDOW))
    source = replace(case(model_type), equal_in_pairs=()).save(tmp_path / "m")
    with pytest.raises(ModelError, match="rotated pair differently") as caught:
        export(source, tmp_path / "b", window_size=WINDOW)
    assert "no attention by distance computes them" in str(caught.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_probe_says_why_a_model_is_refused(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know it")
    changes, reason = REFUSED[model_type]
    config = CONFIG_MAPPING[model_type](**{**WITHOUT_ROPE, **changes})
    with pytest.raises(ModelError, match=reason) as caught:
        plan(config)
    assert model_type in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.slow
def test_an_unknown_model_that_passes_the_probe_exports_with_a_notice(tmp_path):
    assert UNKNOWN.model_type not in FAMILIES
    export_family(UNKNOWN, tmp_path)
    errors = measure_family(UNKNOWN, tmp_path)
    assert max(errors.stock, errors.token_by_token, errors.in_chunks) < TOLERANCE
    notices = json.loads((tmp_path / "b" / "lminf.json").read_text())["notices"]
    assert any("has no test of its own" in notice for notice in notices)
