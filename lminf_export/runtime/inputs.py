"""Checks of the token ids that callers pass in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np

from lminf_export.errors import InputError, shortened, shown
from lminf_export.operator.settings import MAX_POSITION, as_integer

_FEW = 16
# More ids in a list than any stop rule or penalty is about; an iterator may have no end.
_MOST_IDS = 2**22
_ANY_ID = 2**63


def checked_prompt(prompt_ids: Any, vocab_size: int) -> np.ndarray:
    """Return a prompt (P,) as (1, P) int64.

    Raises:
        InputError: it is empty, of another shape or type, or has ids outside the vocabulary.
    """
    ids = integers(prompt_ids, "prompt_ids")
    if ids.size == 0:
        raise InputError("the prompt is empty; give at least one token id")
    if ids.ndim != 1:
        raise InputError(f"prompt_ids has shape {ids.shape}; expected (P,), one stream's ids")
    _check_range(ids, vocab_size)
    return ids[None].astype(np.int64)


def checked_chunk(
    token_ids: Any, lengths: Any, batch_size: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (B, S) int64, zeros in the padding, and the real tokens of each row (B,) int64.

    Raises:
        InputError: another shape or type, ids outside the vocabulary, or wrong lengths.
    """
    ids = integers(token_ids, "token_ids")
    if ids.ndim != 2 or ids.shape[1] < 1 or ids.shape[0] != batch_size:
        raise InputError(
            f"token_ids has shape {ids.shape}; expected ({batch_size}, S) with S ≥ 1, "
            f"a row for each of the state's {batch_size} streams"
        )
    rows, width = ids.shape
    counts = np.full(rows, width, np.int64)
    if lengths is not None:
        counts = _checked_lengths(lengths, rows, width)
        ids = np.where(np.arange(width) < counts[:, None], ids, 0)
    _check_range(ids, vocab_size)
    return ids.astype(np.int64, copy=False), counts


def checked_batch(batch_size: Any, full: Any) -> int:
    """Return the streams that a state is to have, the arguments of `Session.new_state` checked.

    Raises:
        InputError: a batch that is none, or beyond what a graph counts; `full` is no bool.
    """
    if not isinstance(full, bool):
        raise InputError(f"full={shown(full)}: must be True or False")
    return as_integer("batch_size", batch_size, 1, InputError, maximum=2**31 - 1)


def checked_positions(position: Any, batch_size: int) -> np.ndarray:
    """Return the position of every stream (B,) int64, given as one number or as (B,).

    Raises:
        InputError: another shape or type, or outside 0 … 2**40.
    """
    found = integers(position, "position")
    if found.shape not in ((), (batch_size,)):
        raise InputError(f"position has shape {found.shape}; expected a number or ({batch_size},)")
    if found.min() < 0 or found.max() > MAX_POSITION:
        raise InputError(f"position={shown(found.tolist())}: must be 0 … {MAX_POSITION}")
    return np.broadcast_to(found.astype(np.int64), (batch_size,))


def require_step(
    input_ids: Any, new_length: Any, logits_index: Any, batch_size: int, vocab_size: int
) -> None:
    """Refuse arguments of `Session.step` that an engine would take for others; cheap.

    Args:
        input_ids: (B, S) int64, 0 … V − 1.
        new_length: (B,) int64.
        logits_index: (B, K) int64.
        batch_size: B of the state.
        vocab_size: V.

    Raises:
        InputError: another class, shape or type, or an id outside the vocabulary.
    """
    for name, found, ndim in (
        ("input_ids", input_ids, 2),
        ("new_length", new_length, 1),
        ("logits_index", logits_index, 2),
    ):
        if (
            type(found) is not np.ndarray
            or found.dtype != np.int64
            or found.ndim != ndim
            or len(found) != batch_size
        ):
            raise InputError(
                f"{name}={shown(found)}: must be an int64 array, a row for each of "
                f"{batch_size} streams, with {ndim} dimensions"
            )
    if not input_ids.size:
        raise InputError("input_ids is empty; a step takes a token of every stream at least")
    _check_range(input_ids, vocab_size)


def integers(values: Any, name: str) -> np.ndarray:
    """Return values as an array of integers.

    Raises:
        InputError: rows of different lengths, or another type.
    """
    try:
        if isinstance(values, range) and len(values) > _MOST_IDS:
            raise OverflowError
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{name}: rows of different lengths; pad them and pass lengths=") from None
    except (TypeError, OverflowError, RecursionError, MemoryError):
        raise InputError(f"{name}={shown(values)}: expected integers") from None
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{name} has type {shortened(str(array.dtype))}; expected integers")
    return array


def listed_ids(values: Any, name: str, vocab_size: int | None = None) -> list[int]:
    """Return token ids as a list.

    Args:
        values: an array (M,) or any iterable of integers, but no text and no mapping.
        name: of the argument, for messages.
        vocab_size: V, where ids must be 0 … V − 1.

    Raises:
        InputError: another type, ids outside the vocabulary, or no end of them.
    """
    if type(values) is tuple and len(values) == 1 and vocab_size is not None:
        # A decoding step comes here for every token.
        token = values[0]
        if type(token) is int and 0 <= token < vocab_size:
            return [token]
    if isinstance(values, str | bytes | Mapping):
        raise InputError(f"{name}={shown(values)}: must be a list of token ids")
    if not isinstance(values, Sized):
        values = list(itertools.islice(one_by_one(values, name), _MOST_IDS + 1))
        if len(values) > _MOST_IDS:
            raise InputError(f"{name}: more than {_MOST_IDS} token ids, or no end of them")
    if isinstance(values, np.ndarray) or (isinstance(values, list | range) and len(values) > _FEW):
        array = integers(values, name)
        if array.ndim != 1:
            raise InputError(f"{name} has shape {array.shape}; expected a list of token ids")
        if vocab_size is not None and array.size:
            _check_range(array, vocab_size)
        return list(array.tolist())
    least, most = (-_ANY_ID, _ANY_ID) if vocab_size is None else (0, vocab_size - 1)
    return [
        as_integer(name, token, least, InputError, maximum=most)
        for token in one_by_one(values, name)
    ]


def one_by_one(values: Any, name: str) -> Iterator[Any]:
    """Return an iterator over values.

    Raises:
        InputError: there is none.
    """
    try:
        return iter(values)
    except TypeError:
        raise InputError(f"{name}={shown(values)}: must be a list") from None


def _checked_lengths(lengths: Any, rows: int, width: int) -> np.ndarray:
    counts = integers(lengths, "lengths")
    if counts.shape != (rows,) or counts.min() < 0 or counts.max() > width:
        raise InputError(
            f"lengths={shown(counts.tolist())}: must be {rows} numbers of real tokens, 0 … {width}"
        )
    return counts.astype(np.int64)


def _check_range(ids: np.ndarray, vocab_size: int) -> None:
    # Python is faster than numpy on the few ids of a decoding step.
    values = ids.ravel().tolist() if ids.size <= _FEW else (int(ids.min()), int(ids.max()))
    low, high = min(values), max(values)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(
            f"token id {wrong} is outside the vocabulary of {vocab_size} "
            f"(0 … {vocab_size - 1}); was it made by another tokenizer?"
        )
