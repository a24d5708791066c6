"""`validate` of bundles whose int8 rings do not hold what they should, or hold it in vain."""

from __future__ import annotations

import pytest

import lminf_export
from lminf_export.models.base import AttentionPlan
from lminf_export.models.rounded_rings import Int8Rings
from lminf_export.runtime.onnxruntime_state import OnnxRuntimeState
from lminf_export.verify import recorded_rings
from lminf_export.verify import validate as validate_module
from lminf_export.verify.tolerance import FLOAT32_TOLERANCE
from lminf_export.verify.validate import validate
from tests.support.biased_models import save_qwen2

SETTINGS = {"window_size": 29, "chunk_size": 7, "num_sink_tokens": 3, "kv_cache_dtype": "int8"}
TOKENS = 131


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_qwen2(tmp_path_factory.mktemp("m") / "qwen2", 300.0)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return lminf_export.export(model, tmp_path_factory.mktemp("b") / "int8", **SETTINGS)


def corrupt(monkeypatch, change):
    """Let a step that brings position 40 change what rings hold of it."""
    run = OnnxRuntimeState.run

    def wrong(self, *arguments):
        logits = run(self, *arguments)
        start, width = int(self.past_length[0]), arguments[0].shape[1]
        if start <= 40 < start + width:
            change({cache.past: cache.array for cache in self._bound.caches})
        return logits

    monkeypatch.setattr(OnnxRuntimeState, "run", wrong)


def at_40(rings, name):
    ring = rings[f"past_key_values.1.{name}"]
    return ring[0, 1, 40 % ring.shape[2]]


def one_scale(rings):
    at_40(rings, "key_scale")[...] *= 1.01


def one_integer(rings):
    integers = at_40(rings, "value")
    integers[3] += 1 if integers[3] < 100 else -1


@pytest.mark.slow
def test_right_rings_pass_at_the_tolerance_of_float32(bundle):
    report = validate(bundle.path, num_tokens=TOKENS)
    assert report.passed
    assert {row.tolerance for row in report.comparisons} == {FLOAT32_TOLERANCE}
    assert all(row.largest_gap < row.allowed_gap < 0.01 for row in report.rings)
    assert len(report.rings) == 2
    assert 0 < report.ring_cost.mean_error < report.ring_cost.limit


@pytest.mark.parametrize("change", [one_scale, one_integer])
def test_one_wrong_number_in_a_ring_fails(bundle, monkeypatch, change):
    corrupt(monkeypatch, change)
    report = validate(bundle.path, num_tokens=TOKENS)
    assert not report.passed
    assert not any(row.passed for row in report.rings)


@pytest.mark.slow
def test_rings_that_keep_the_bias_fail_where_it_should_be_out(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(AttentionPlan, "keeps_bias_out", lambda *_: False)
        before = lminf_export.export(model, tmp_path / "before", **SETTINGS)
    monkeypatch.setattr(validate_module, "rounding_of", lambda _: Int8Rings(keeps_bias=False))
    report = validate(before.path, num_tokens=TOKENS)
    assert not any(row.passed for row in report.rings)
    assert not any(row.passed for row in report.comparisons[:2])


@pytest.mark.slow
def test_rounding_that_costs_too_much_fails_though_it_is_right(bundle, monkeypatch):
    monkeypatch.setattr(recorded_rings.RingCost, "limit", 1e-9, raising=False)
    monkeypatch.setattr(recorded_rings.RingCost.__init__, "__defaults__", (1e-9,))
    report = validate(bundle.path, num_tokens=TOKENS)
    assert all(row.passed for row in (*report.comparisons, *report.rings))
    assert not report.passed
