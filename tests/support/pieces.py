"""Logits of a whole stream, however it is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lminf_export import LanguageModel
from lminf_export.verify.bundle_run import BundleRun


def run_in_pieces(model: LanguageModel, tokens: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Feed a stream (T,) in pieces of repeating sizes; return logits (T, V)."""
    return np.concatenate(list(BundleRun(model, tokens, sizes).rows(len(tokens))))
