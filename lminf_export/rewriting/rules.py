"""Frequencies of a rotation by the one rule that a graph without a configuration can follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from lminf_export.rewriting.turning import Turning

# How exactly a frequency of a rule is met by one that was measured, relative to it.
_NEAR = 1e-6


def round_base(turning: Turning) -> tuple[float, torch.Tensor] | None:
    """Return θ, and the (R/2,) float32 frequencies θ^(−2i/R), of the roundest θ that fits.

    None if the measured frequencies are others, as those of a scaled rotation are.
    """
    speeds, dims = np.asarray(turning.inv_freq, np.float64), turning.rotary_dim
    exponents = np.arange(0, dims, 2) / dims
    usable = (exponents > 0) & (speeds > 20 * turning.error)
    if not usable.any():
        return None
    last = np.flatnonzero(usable)[-1]
    theta = float(np.exp(-np.log(speeds[last]) / exponents[last]))
    for digits in range(1, 8):
        base = float(f"{theta:.{digits}g}")
        ruled = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims))
        error = np.abs(ruled.double().numpy() - speeds)
        if (error <= turning.error + _NEAR * speeds).all():
            return base, ruled
    return None
