"""How rings that round change keys and values, for the reference step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from lminf_export.operator.reference import Rounding
from lminf_export.operator.reference_int8 import round_to_int8


class Rings(Protocol):
    """The rings of all layers of one stream, or of several that round alike."""

    @property
    def keeps_bias(self) -> bool:
        """Whether the bias of keys is rounded with them instead of kept out."""
        ...

    def of_layer(self, layer: int, heads: slice, position: Tensor) -> tuple[Rounding, Rounding]:
        """Return what becomes of rotated keys, and of values, (B, G, M, D).

        Args:
            layer: its index.
            heads: which of its key/value heads come.
            position: (B, M) int64, of their tokens.
        """
        ...


@dataclass(frozen=True)
class Int8Rings:
    """Rings of int8 as the specification rounds.

    Attributes:
        keeps_bias: the bias of keys is rounded with them.
        tie_margin: see `reference_int8.round_to_int8`.
    """

    keeps_bias: bool = False
    tie_margin: float = 0.0

    def of_layer(self, layer: int, heads: slice, position: Tensor) -> tuple[Rounding, Rounding]:
        """See `Rings`."""
        rounding = partial(round_to_int8, tie_margin=self.tie_margin)
        return rounding, rounding
