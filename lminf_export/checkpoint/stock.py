"""The unmodified model of transformers, which others are compared with."""

from __future__ import annotations

import torch

from lminf_export.checkpoint.opening import Checkpoint, load_model
from lminf_export.checkpoint.streamed import StreamedModel

# The one that computes all of a model's attention: in some releases others leave soft caps out.
_ATTENTION = "eager"
# A model up to this size is loaded whole, by transformers' own reading of its files.
_WHOLE_BYTES = 64 * 2**20


def stock_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StreamedModel:
    """Return the unmodified model: read by transformers if it is small, else while it runs."""
    size = sum(tensor.numel() for tensor in checkpoint.skeleton.model.parameters())
    if checkpoint.is_plain and size * dtype.itemsize <= _WHOLE_BYTES:
        return StreamedModel(load_model(checkpoint, dtype, _ATTENTION))
    return StreamedModel.of(checkpoint, dtype, _ATTENTION)
