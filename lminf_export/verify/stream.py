"""The tokens that a bundle is validated on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import InputError
from lminf_export.operator.settings import as_integer

WINDOWS = 4


def default_length(window_size: int) -> int:
    """Return the default number of tokens of a stream: a little over 4 windows."""
    return WINDOWS * window_size + 17


def make_stream(
    manifest: Manifest, num_tokens: int | None, token_ids: Sequence[int] | None, seed: int
) -> NDArray[np.int64]:
    """Return the first tokens of a text, or random ones, (T,).

    Args:
        manifest: of the bundle as it is tested.
        num_tokens: T ≥ 1; by default the whole text, or `default_length` for random tokens.
        token_ids: the text's tokens; None for random ones.
        seed: of the random tokens.

    Raises:
        InputError: no tokens.
    """
    if num_tokens is not None:
        num_tokens = as_integer("tokens", num_tokens, 1, InputError)
    if token_ids is not None:
        if not len(token_ids):
            raise InputError("the text has no tokens; validation needs at least 1")
        return np.asarray(token_ids[:num_tokens], dtype=np.int64)
    count = num_tokens or default_length(max(layer.window_size for layer in manifest.layers))
    return np.random.default_rng(seed).integers(0, manifest.vocab_size, count)


def notes_on(manifest: Manifest, own_window: int, num_tokens: int) -> tuple[str, ...]:
    """Return in words what a stream does not show.

    Args:
        manifest: of the bundle as it is tested.
        own_window: the bundle's largest window.
        num_tokens: T.
    """
    layers = manifest.layers
    window = max(layer.window_size for layer in layers)
    slots = max(layer.ring_capacity for layer in layers)
    notes = []
    if window != own_window:
        notes.append(
            f"tested with a window of {window} tokens in the place of {own_window}: the same graph "
            f"and weights over rings of {slots} slots, which wrap {num_tokens // slots} times; "
            f"--window {own_window} takes the bundle's own"
        )
    if num_tokens <= window:
        notes.append(f"the stream of {num_tokens} tokens stays inside the window of {window}")
    elif num_tokens <= slots:
        notes.append(f"the stream of {num_tokens} tokens wraps no ring of {slots} slots")
    return tuple(notes)
