"""A bundle given as the model of an export: said in words, or refused where it is quantised."""

from __future__ import annotations

import numpy as np
import pytest

from lminf_export import ModelError, export, load
from tests.support.tiny_models import save_llama

TOKENS = [[5, 3, 8, 1, 2, 9, 4, 7, 6]]


def logits(bundle):
    model = load(bundle.path)
    return model.forward(TOKENS, model.new_state())


@pytest.mark.slow
def test_plain_weights_are_exported_once_more_with_a_notice(tmp_path):
    first = export(save_llama(tmp_path / "tiny"), tmp_path / "b", window_size=20, dtype="float16")
    again = export(first.path, tmp_path / "c", window_size=20)
    [notice] = [text for text in again.manifest.notices if "is a bundle" in text]
    assert "exported from 'tiny'" in notice
    assert "in float16" in notice
    found, wanted = logits(again), logits(first)
    assert np.abs(found - wanted).max() < 2e-2 * np.ptp(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_quantised_weights_are_refused_with_the_model_to_take(quantize, tmp_path):
    first = export(save_llama(tmp_path / "tiny"), tmp_path / "b", window_size=20, quantize=quantize)
    with pytest.raises(ModelError, match=rf"bundle of quantised weights \({quantize}\).*'tiny'"):
        export(first.path, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_bundle_with_a_damaged_manifest_is_named(tmp_path):
    first = export(save_llama(tmp_path / "tiny"), tmp_path / "b", window_size=20)
    (first.path / "lminf.json").write_text("{")
    with pytest.raises(ModelError, match=r"is a bundle: .*lminf\.json"):
        export(first.path, tmp_path / "c")
