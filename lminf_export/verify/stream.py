"""The tokens that a bundle is validated on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import InputError

MIN_WINDOWS = 4


def default_length(manifest: Manifest) -> int:
    """Return the default number of tokens of a stream: a little over 4 windows."""
    return MIN_WINDOWS * manifest.settings.window_size + 17


def make_stream(
    manifest: Manifest, num_tokens: int | None, token_ids: Sequence[int] | None, seed: int
) -> NDArray[np.int64]:
    """Return the first tokens of a text, or random ones, (T,).

    Args:
        manifest: of the bundle.
        num_tokens: T; by default the whole text, or `default_length` for random tokens.
        token_ids: the text's tokens; None for random ones.
        seed: of the random tokens.

    Raises:
        InputError: fewer tokens than 4 windows.
    """
    least = MIN_WINDOWS * manifest.settings.window_size + 1
    count = default_length(manifest) if num_tokens is None else num_tokens
    if token_ids is not None:
        count = len(token_ids) if num_tokens is None else min(num_tokens, len(token_ids))
    if count < least:
        raise InputError(
            f"validation needs more than {MIN_WINDOWS} windows of "
            f"{manifest.settings.window_size} tokens, at least {least}; found {count}"
        )
    if token_ids is not None:
        return np.asarray(token_ids[:count], dtype=np.int64)
    return np.random.default_rng(seed).integers(0, manifest.vocab_size, count)
