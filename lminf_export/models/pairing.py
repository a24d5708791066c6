"""Which dimensions a rotary embedding pairs, and in which direction it turns them.

Known vectors are rotated by the model's own functions and compared with the operator's rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lminf_export.errors import ModelError
from lminf_export.operator import reference

_POSITIONS = (1, 2, 3)


@dataclass(frozen=True)
class Pairing:
    """How dimensions are turned.

    Attributes:
        interleaved: pairs (2i, 2i+1) instead of (i, i + R/2).
        sign: 1, or −1 for a model that turns backwards: its frequencies are negative.
    """

    interleaved: bool
    sign: int


def find_pairing(
    rotated: Callable[[Tensor, Tensor], Tensor], inv_freq: Tensor, factor: float
) -> Pairing:
    """Find the pairing of a rotation.

    Args:
        rotated: turns (1, 1, 3, R) by the positions (1, 3).
        inv_freq: (R/2,) frequencies.
        factor: the attention factor.

    Raises:
        ModelError: it is neither half-split nor interleaved.
    """
    position = torch.tensor([_POSITIONS])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, len(_POSITIONS), 2 * inv_freq.numel(), generator=generator)
    found = rotated(x, position)
    angle = position[:, None, :, None] * inv_freq
    cos, sin = angle.cos() * factor, angle.sin() * factor
    for interleaved in (False, True):
        for sign in (1, -1):
            wanted = reference.rotate(x, cos, sign * sin, interleaved=interleaved)
            if found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4):
                return Pairing(interleaved, sign)
    raise ModelError(
        "the rotary embedding of this model pairs its dimensions in a way that is not recognised "
        "(neither half-split nor interleaved); its keys could not be re-positioned"
    )
