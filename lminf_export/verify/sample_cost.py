"""The cost of quantisation on the beginning of a text, measured right after an export."""

from __future__ import annotations

import numpy as np
import torch

from lminf_export.bundle.folder import Bundle
from lminf_export.checkpoint.opening import Checkpoint
from lminf_export.errors import InputError
from lminf_export.models.base import Family
from lminf_export.progress import Progress
from lminf_export.runtime.load import load
from lminf_export.runtime.text import TextCodec
from lminf_export.verify.bundle_run import BundleRun
from lminf_export.verify.likelihood import negative_log_likelihood
from lminf_export.verify.perplexity_cost import PerplexityCost, cost_of
from lminf_export.verify.reference_model import Reference, bundle_plan

# Tokens of the text that are read, and those whose logits are held at a time.
TOKENS, PIECE = 2048, 64


def sample_cost(
    bundle: Bundle, original: Checkpoint, family: Family, text: str, progress: Progress
) -> PerplexityCost:
    """Compare a bundle's perplexity with its model's under the same attention.

    Args:
        bundle: a quantised one, with a tokenizer.
        original: the model it was made of.
        family: the model's adapter.
        text: of two tokens at least; the first 2,048 are read.
        progress: told of every layer of the model.

    Raises:
        InputError: a shorter text.
        BundleError: the bundle has no tokenizer.
    """
    tokens = np.asarray(TextCodec.of(bundle).encode(text)[:TOKENS], np.int64)
    if len(tokens) < 2:
        raise InputError("the sample text has one token; give a longer one")
    plan = bundle_plan(bundle, family, original)
    full = Reference(original, family, plan, tokens, progress).logits(torch.float32)
    progress("reading the text with the bundle", None)
    run = BundleRun(load(bundle.path), tokens, (PIECE,))
    before, after, start = [], [], 0
    for logits in run.rows(len(tokens) - 1):
        stop = start + len(logits)
        targets = tokens[start + 1 : stop + 1]
        before.append(negative_log_likelihood(full.rows(start, stop), targets, np.float64))
        after.append(negative_log_likelihood(logits, targets, np.float64))
        start = stop
    return cost_of(np.concatenate(before), np.concatenate(after))
