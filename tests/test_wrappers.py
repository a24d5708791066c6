"""Multimodal models: their text model is exported, equal to the whole model on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from benchmarks.support.wrappers import CASES, WrapperCase
from lminf_export.checkpoint.opening import load_model, open_checkpoint
from lminf_export.checkpoint.source import open_source

TOLERANCE = 2e-5
LENGTH = 20
TOKENS = np.random.default_rng(0).integers(3, 100, LENGTH)


@torch.no_grad()
def logits_of(model: Any) -> np.ndarray:
    return model(input_ids=torch.from_numpy(TOKENS[None])).logits[0].float().numpy()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.ptp(wanted))


def text_model(folder: Path) -> Any:
    """Load the text model of a wrapper's folder as an export and a validation read it."""
    return load_model(open_checkpoint(open_source(folder)), torch.float32, None)


def is_known(case: WrapperCase) -> bool:
    return case.model_type in CONFIG_MAPPING and case.text_type in CONFIG_MAPPING


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_the_text_model_is_the_whole_model_on_text(case, tmp_path):
    if not is_known(case):
        pytest.skip("this version of transformers does not know it")
    whole = case.build()
    wanted = logits_of(whole)
    if case.scale:
        wanted = wanted * getattr(whole.config.get_text_config(), case.scale)
    for is_old in (True, False):  # names of the hub, and of transformers 5
        folder = tmp_path / f"{is_old}"
        whole.save_pretrained(folder, save_original_format=is_old)
        source = open_source(folder)
        assert (source.model_type, source.wrapper) == (case.text_type, case.model_type)
        assert error(logits_of(text_model(folder)), wanted) < TOLERANCE
