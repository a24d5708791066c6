"""The unmodified model of transformers, which others are compared with."""

from __future__ import annotations

from typing import Any

import torch

from lminf_export.checkpoint.opening import Checkpoint, load_model
from lminf_export.checkpoint.streamed import StreamedModel
from lminf_export.models.remote_code import runs_own_code

# A model up to this size is loaded whole, by transformers' own reading of its files.
_WHOLE_BYTES = 64 * 2**20


def stock_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StreamedModel:
    """Return the unmodified model: read by transformers if it is small, else while it runs."""
    attention = _attention_of(checkpoint.source.config)
    size = sum(tensor.numel() for tensor in checkpoint.skeleton.model.parameters())
    if checkpoint.is_plain and size * dtype.itemsize <= _WHOLE_BYTES:
        return StreamedModel(load_model(checkpoint, dtype, attention))
    return StreamedModel.of(checkpoint, dtype, attention)


def _attention_of(config: Any) -> str | None:
    """Return the attention to compare with: transformers' default, if that computes all of it.

    In some releases only the eager one has the soft caps of logits. It is not taken for all models:
    Falcon's scales its biases in another way than the default does. A repository's own code always
    has one that it calls eager, and the probe has run it.
    """
    is_eager = getattr(config, "attn_logit_softcapping", None) or runs_own_code(config)
    return "eager" if is_eager else None
