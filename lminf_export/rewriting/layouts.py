"""How heads, tokens and dimensions lie in a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import ModelError

Array = NDArray[Any]
# Tokens of the two runs whose shapes are compared.
SHORT, LONG = 5, 6
Shapes = tuple[tuple[int, ...], tuple[int, ...]]
Order = Literal["BHSD", "BSHD", "BSE", "NSD", "TE", "THD"]


def are_of_tokens(shapes: Shapes, width: int | None = None) -> bool:
    """Say whether shapes are (1, tokens, features), and of a width where one is given."""
    short, long = shapes
    found = short[-1] if short else 0
    return (short, long) == ((1, SHORT, found), (1, LONG, found)) and width in (None, found)


@dataclass(frozen=True)
class Layout:
    """Order of the dimensions of queries, keys, values or an output.

    B·H together are N, B·S together T, H·D together E.

    Attributes:
        order: of the dimensions.
        heads: H.
        head_dim: D.
    """

    order: Order
    heads: int
    head_dim: int

    def to_heads(self, array: Array) -> Array:
        """Return (1, H, S, D) of an array of one sequence."""
        if self.order in ("BHSD", "NSD"):
            return array.reshape(1, self.heads, -1, self.head_dim)
        return array.reshape(1, -1, self.heads, self.head_dim).transpose(0, 2, 1, 3)

    def from_heads(self, array: Array) -> Array:
        """Return an array of (1, H, S, D) in this order."""
        _, heads, tokens, dim = array.shape
        by_token = array.transpose(0, 2, 1, 3)
        shaped = {
            "BHSD": lambda: array,
            "NSD": lambda: array.reshape(heads, tokens, dim),
            "BSHD": lambda: by_token,
            "BSE": lambda: by_token.reshape(1, tokens, heads * dim),
            "TE": lambda: by_token.reshape(tokens, heads * dim),
            "THD": lambda: by_token.reshape(tokens, heads, dim),
        }[self.order]()
        return np.ascontiguousarray(shaped)


@dataclass(frozen=True)
class Layouts:
    """Layouts of what one attention takes and gives."""

    query: Layout
    key: Layout
    value: Layout
    output: Layout


def find_layout(shapes: Shapes, head_dim: int, what: str) -> Layout:
    """Return the layout of a tensor from its shapes in two runs of one sequence.

    Args:
        shapes: with SHORT tokens and with LONG.
        head_dim: D.
        what: in messages.

    Raises:
        ModelError: it has another layout than those known.
    """
    layout = known_layout(shapes, head_dim)
    if layout is None:
        raise ModelError(
            f"{what} have shape {shapes[0]}, which is no layout of heads of {head_dim} dimensions"
        )
    return layout


def known_layout(shapes: Shapes, head_dim: int) -> Layout | None:
    """Return the same, None where it has no layout that is known."""
    short, long = shapes
    changed = [axis for axis, (a, b) in enumerate(zip(short, long, strict=False)) if a != b]
    if len(short) != len(long) or len(changed) != 1:
        return None
    axis = changed[0]
    width = int(np.prod(short)) // SHORT
    order = _order(short, axis, head_dim)
    if (short[axis], long[axis]) != (SHORT, LONG) or order is None or width % head_dim:
        return None
    return Layout(order, width // head_dim, head_dim)


def _order(shape: tuple[int, ...], axis: int, dim: int) -> Order | None:
    batched = shape[0] == 1
    match len(shape), axis:
        case 4, 2 if batched and shape[3] == dim:
            return "BHSD"
        case 4, 1 if batched and shape[3] == dim:
            return "BSHD"
        case 3, 1 if shape[2] == dim and not batched:
            return "NSD"
        case 3, 1 if batched:
            return "BSE"
        case 3, 0 if shape[2] == dim:
            return "THD"
        case 2, 0:
            return "TE"
    return None
