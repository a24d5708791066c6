"""How rings that round change keys and values, for the reference step."""

from __future__ import annotations

from dataclasses import dataclass
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

    def of_layer(
        self, layer: int, heads: slice, position: Tensor, bias: Tensor | None
    ) -> tuple[Rounding, Rounding]:
        """Return what becomes of rotated keys, and of values, (B, G, M, D).

        Args:
            layer: its index.
            heads: which of its key/value heads come.
            position: (B, M) int64, of their tokens.
            bias: (G, D) of those heads that is kept out of the keys, or None.
        """
        ...


@dataclass(frozen=True)
class Int8Rings:
    """Rings of int8 as the specification rounds.

    Attributes:
        keeps_bias: the bias of keys is rounded with them.
    """

    keeps_bias: bool = False

    def of_layer(
        self, layer: int, heads: slice, position: Tensor, bias: Tensor | None
    ) -> tuple[Rounding, Rounding]:
        """See `Rings`."""
        return round_to_int8, round_to_int8
