"""Validation in bounded memory: weights layer by layer, logits in blocks, small windows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.support import own_families
from benchmarks.support.families import CASES
from lminf_export import export
from lminf_export.checkpoint import streamed
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source
from lminf_export.cli.validate import validate_command
from lminf_export.tensors.rows import gather_rows, row_blocks
from lminf_export.verify import comparison, estimate
from lminf_export.verify.comparison import Differences, LogitRange
from tests.support.memory import MIB, peak_of
from tests.support.tiny_models import save_llama

SAVERS = {case.model_type: case.save for case in CASES} | {
    name: lambda folder, name=name: own_families.save(name, folder) for name in own_families.CASES
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", SAVERS)
def test_a_streamed_model_computes_what_the_whole_one_does(name, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "_SMALL_BYTES", 0)  # nothing is read before it is needed
    checkpoint = open_checkpoint(open_source(SAVERS[name](tmp_path / "m")))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 131, 25))
    model = streamed.StreamedModel.of(checkpoint, torch.float64)
    hidden = model.hidden_states(tokens)
    logits = torch.cat([model.logits(part) for part in hidden.split(11)])
    assert all(parameter.is_meta for parameter in model.model.parameters())
    with torch.no_grad():
        whole = load_model(checkpoint, torch.float64, None)(tokens[None], use_cache=False).logits
    assert torch.allclose(logits, whole[0], rtol=0, atol=1e-6 * float(whole.max() - whole.min()))


class _Rows:
    """A tensor that comes in blocks which end anywhere."""

    dtype, shape = "F32", (13, 5)

    def blocks(self):
        return iter(torch.arange(65, dtype=torch.float32).split(17))


def test_rows_come_whole_however_blocks_are_cut(monkeypatch):
    monkeypatch.setattr("lminf_export.tensors.rows.BLOCK_ELEMENTS", 20)
    wanted = torch.arange(65, dtype=torch.float64).view(13, 5)
    found = [(first, rows.clone()) for first, rows in row_blocks(_Rows(), torch.float64)]
    assert [first for first, _ in found] == [0, 4, 8, 12]
    assert torch.equal(torch.cat([rows for _, rows in found]), wanted)
    index = torch.tensor([0, 4, 7, 12])
    assert torch.equal(gather_rows(_Rows(), index, torch.float64), wanted[index])


def test_blocks_of_tokens_give_the_errors_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(50, 7))
    found = (wanted + rng.normal(size=(50, 7)) * 0.1).astype(np.float32)
    monkeypatch.setattr(comparison, "_SCRATCH_ELEMENTS", 21)
    scale, differences = LogitRange(), Differences()
    for start in range(0, 50, 11):
        scale.add(wanted[start : start + 11])
        differences.add(found[start : start + 11], wanted[start : start + 11])
    result = differences.relative_to(scale, "name", 1.0)
    error = np.abs(found - wanted) / np.ptp(wanted)
    assert result.max_error == pytest.approx(error.max(), rel=1e-12)
    assert result.mean_error == pytest.approx(error.mean(), rel=1e-12)
    assert result.argmax_agreement == np.mean(found.argmax(-1) == wanted.argmax(-1))
    assert (result.tokens, result.passed) == (50, True)
    differences.add(np.full((1, 7), np.nan), wanted[:1])
    assert not differences.relative_to(scale, "name", 1.0).passed


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("b")
    model = save_llama(folder / "m")
    return export(model, folder / "b", window_size=61, num_sink_tokens=3, chunk_size=7).path


def run(*arguments):
    return CliRunner().invoke(validate_command, [str(x) for x in arguments])


@pytest.mark.slow
def test_a_smaller_window_wraps_the_rings_and_is_named(bundle):
    result = run(bundle, "--window", 11)
    assert result.exit_code == 0, result.output
    assert "window of 11 tokens in the place of 61" in result.output
    assert "--window 61" in result.output
    report = json.loads(run(bundle, "--window", 11, "--json").stdout)
    assert (report["window_size"], report["tested_window"]) == (61, 11)
    assert report["comparisons"][0]["tokens"] == 4 * 11 + 17


@pytest.mark.parametrize("window", [0, 62])
def test_a_window_the_bundle_does_not_have_is_refused(bundle, window):
    result = run(bundle, "--window", window)
    assert result.exit_code == 2
    assert "expected 1 … 61" in result.stderr


def test_what_does_not_fit_is_refused_in_one_line(bundle, monkeypatch):
    monkeypatch.setattr(estimate, "available_memory", lambda: 50 * MIB)
    result = run(bundle)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "50.0 MiB is available" in line
    assert "--window" in line
    monkeypatch.undo()
    result = run(bundle, "--max-hours", 0)
    assert result.exit_code == 2
    assert "--max-hours" in result.stderr


@pytest.mark.slow
def test_a_large_vocabulary_takes_no_more_than_a_gibibyte(tmp_path):
    model = save_llama(tmp_path / "m", vocab_size=262144, hidden_size=252)
    bundle = export(model, tmp_path / "b", window_size=64, chunk_size=16)
    validation = f"lminf_export.validate({str(bundle.path)!r}, window=32)"
    code = f"import lminf_export; assert {validation}.passed"
    imports = ("lminf_export.verify.validate", "transformers.models.llama.modeling_llama")
    # All logits of the stream in float64 would be 297 MiB, the embeddings twice 504.
    assert peak_of(code, *imports) < 1024 * MIB
