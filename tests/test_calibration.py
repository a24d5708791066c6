"""Calibration: less error on inputs like those that were seen, in memory of one layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lminf_export import ConfigError, InputError, export
from lminf_export.cli.export import export_command
from lminf_export.cli.validate import validate_command
from lminf_export.export.calibration import LENGTH, calibration_batch
from lminf_export.quantize import calibrated
from lminf_export.quantize.calibrated import InputStatistics, calibrated_rows
from lminf_export.quantize.formats import BlockFormat, dequantize_rows
from lminf_export.quantize.search import searched_rows
from tests.support.tiny_models import save_llama

DEMO = "examples/demo-llama"
SETTINGS = {"window_size": 64, "num_sink_tokens": 4, "chunk_size": 32}


def inputs(count: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs of few directions, some of them large."""
    basis = torch.Generator().manual_seed(0)
    mixing = (
        torch.randn(columns, columns, generator=basis) * torch.logspace(0, -3, columns)[:, None]
    )
    own = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=own) @ mixing


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "section"), [(96, 4096), (75, 4096), (96, 40), (1, 4096)])
def test_outputs_err_less_than_those_of_the_nearest_integers(
    columns, section, symmetric, monkeypatch
):
    monkeypatch.setattr(calibrated, "SECTION", section)
    rows = torch.randn(33, columns, generator=torch.Generator().manual_seed(1))
    form = BlockFormat(33, columns, 4, 16, symmetric)
    seen, later = inputs(400, columns, 2), inputs(400, columns, 3)
    statistics = InputStatistics(columns, form.block_size)
    statistics.add(seen[:150])
    statistics.add(seen[150:].reshape(2, 125, columns))
    blocks = calibrated_rows(rows, form, "float16", statistics, positive=False)
    assert (blocks.packed.shape, blocks.scales.shape) == (form.packed_shape, form.scales_shape)
    errors = [
        (later @ (torch.from_numpy(dequantize_rows(b, form).copy()) - rows).T).square().sum()
        for b in (blocks, searched_rows(rows, form, "float16"))
    ]
    assert errors[0] < (0.5 if columns > 1 and section == 4096 else 1.01) * errors[1]


def test_inputs_that_were_never_seen_change_nothing_but_are_no_error():
    form = BlockFormat(5, 32, 4, 16, symmetric=False)
    statistics = InputStatistics(32, 16)
    rows = torch.randn(5, 32)
    blocks = calibrated_rows(rows, form, "float32", statistics, positive=False)
    plain = searched_rows(rows, form, "float32")
    assert np.array_equal(blocks.packed, plain.packed)
    statistics.add(torch.ones(3, 32))  # one direction alone
    again = calibrated_rows(rows, form, "float32", statistics, positive=False)
    assert np.isfinite(dequantize_rows(again, form)).all()


def test_a_text_becomes_rows_behind_the_start_tokens(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("In the beginning was the word.\n" * 500, encoding="utf-8")
    batch = calibration_batch(Path(DEMO) / "tokenizer.json", text)
    assert batch.shape[1] <= LENGTH
    assert batch.shape[0] > 1
    assert calibration_batch(Path(DEMO) / "tokenizer.json", text, 2**16).size <= LENGTH
    text.write_bytes(b"\xff\xfe" * 3)
    with pytest.raises(InputError, match="UTF-8"):
        calibration_batch(Path(DEMO) / "tokenizer.json", text)
    text.write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="calibrate takes 32"):
        calibration_batch(Path(DEMO) / "tokenizer.json", text)
    with pytest.raises(InputError, match="no tokenizer"):
        calibration_batch(tmp_path / "tokenizer.json", text)


def test_settings_without_a_meaning_are_refused(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("a", encoding="utf-8")
    for quantize in (None, "int8"):
        with pytest.raises(ConfigError, match="only int4 weights are calibrated"):
            export(DEMO, tmp_path / "b", quantize=quantize, calibrate=text)
    with pytest.raises(InputError, match="cannot read"):
        export(DEMO, tmp_path / "b", quantize="int4", calibrate=tmp_path / "none.txt")
    assert not (tmp_path / "b").exists()


def test_a_model_without_a_tokenizer_is_refused_and_leaves_nothing(tmp_path):
    model = save_llama(tmp_path / "m")
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        export(model, tmp_path / "b", quantize="int4", calibrate=f"{DEMO}/heldout.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.slow
def test_a_calibrated_bundle_is_right_and_says_what_it_costs(tmp_path):
    out, text = tmp_path / "b", f"{DEMO}/heldout-austen.txt"
    result = CliRunner().invoke(
        export_command,
        ["--model", DEMO, "--out", str(out), "--window-size", "64", "--quantize", "int4",
         "--mixed", "off", "--calibrate", text, "--sample-text", f"{DEMO}/heldout.txt", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout[result.stdout.index("{") :])
    assert "42 of 42 weights of 4 bits are calibrated on the text" in report["notices"]
    cost = report["perplexity_cost"]
    assert cost["tokens"] == 2047
    assert -0.01 < cost["cost"] < 0.04
    methods = {t["method"] for t in report["manifest"]["quantization"]["tensors"].values()}
    assert methods == {"calibrate", "search"}
    checked = CliRunner().invoke(
        validate_command, [str(out), "--model", DEMO, "--tokens", "300", "--json"]
    )
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["differing_weights"] == []
