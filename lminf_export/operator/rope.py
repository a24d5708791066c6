"""Exact rotary rows for any position below 2**40.

A float32 product position × frequency is wrong by 4e-3 at 10⁵ tokens and useless at 10⁷.
Instead the position is written in base 1024, p = d0 + 1024·d1 + 1024²·d2 + 1024³·d3, and
R(p) = R(d0)·R(1024·d1)·R(1024²·d2)·R(1024³·d3): four tables of 1024 rows. The angle of
a table entry, d·1024ᵏ·f with f a float32, is exact in float64, so each entry is right to
float32's last bit and the product of four to a few of them, at position 10 as at 10¹².

Source: docs/operator.md, "Positions".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 1024
NUM_DIGITS = 4


@dataclass(frozen=True)
class RotaryTables:
    """Digit tables of one kind of rotation.

    Attributes:
        cos: (4·1024, R/2) float32; row 1024·k + d is the angle d·1024ᵏ·f. The first 1024
            rows carry the attention factor.
        sin: like cos.
        limit_cos: (R/2,) float32, cos(L·f) times the attention factor squared.
        limit_sin: like limit_cos.
    """

    cos: Tensor
    sin: Tensor
    limit_cos: Tensor
    limit_sin: Tensor


def rotary_tables(
    inv_freq: Tensor, distance_limit: int, attention_factor: float = 1.0
) -> RotaryTables:
    """Build the digit tables and the row of the distance limit.

    Args:
        inv_freq: (R/2,) float32 radians per token, after the model's scaling; taken as exact.
        distance_limit: L, tokens.
        attention_factor: m of YaRN and longrope, 1 elsewhere.
    """
    freq = [float(f) for f in inv_freq.to(torch.float32)]
    angles = [[d * BASE**k * f for f in freq] for k in range(NUM_DIGITS) for d in range(BASE)]
    factors = [attention_factor] * BASE + [1.0] * (NUM_DIGITS - 1) * BASE
    # math.cos reduces huge arguments exactly; vectorised cosines may not.
    cos = [[m * math.cos(a) for a in row] for m, row in zip(factors, angles, strict=True)]
    sin = [[m * math.sin(a) for a in row] for m, row in zip(factors, angles, strict=True)]
    limit = [attention_factor**2 * _rotation(distance_limit, f) for f in freq]
    return RotaryTables(
        cos=torch.tensor(cos, dtype=torch.float64).to(torch.float32),
        sin=torch.tensor(sin, dtype=torch.float64).to(torch.float32),
        limit_cos=torch.tensor([z.real for z in limit], dtype=torch.float32),
        limit_sin=torch.tensor([z.imag for z in limit], dtype=torch.float32),
    )


def _rotation(position: int, f: float) -> complex:
    """Return cos + i·sin of position·f in float64, digit by digit: each angle is exact."""
    turn = 1 + 0j
    for k in range(NUM_DIGITS):
        angle = (position // BASE**k % BASE) * BASE**k * f
        turn *= complex(math.cos(angle), math.sin(angle))
    return turn


def rotary_rows(position: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compose the rows of given positions from digit tables, in the tables' type.

    Args:
        position: (...,) int64, 0 ≤ p < 2**40.
        cos: (4·1024, R/2).
        sin: like cos.

    Returns:
        cos and sin of shape (..., R/2).
    """
    weights = torch.tensor([BASE**k for k in range(NUM_DIGITS)])
    offsets = torch.tensor([BASE * k for k in range(NUM_DIGITS)])
    row = position[..., None] // weights % BASE + offsets
    c, s = cos[row], sin[row]
    while c.shape[-2] > 1:
        half = c.shape[-2] // 2
        c0, c1, s0, s1 = c[..., :half, :], c[..., half:, :], s[..., :half, :], s[..., half:, :]
        c, s = c0 * c1 - s0 * s1, s0 * c1 + c0 * s1
    return c.squeeze(-2), s.squeeze(-2)
