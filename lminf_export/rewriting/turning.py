"""The rotation of keys, measured: which dimensions form pairs, and how fast each pair turns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lminf_export.errors import ModelError
from lminf_export.rewriting.attending import Attention

Array = NDArray[Any]
# Tokens of one run; from their distances the speeds are found, and from farther ones better.
_TOKENS = 17
_FAR_TOKENS = 129
_STILL = 2e-6
_TOLERANCE = 2e-4
# Radians by which a rotation may miss what shorter distances let expect.
_SLACK = 0.05
_ULPS = 24
# Angles from here on are rounded too coarsely to make a speed better.
_COARSE = 2**10


@dataclass(frozen=True)
class Turning:
    """How keys are rotated.

    Attributes:
        inv_freq: (R/2,) radians per token: float32 if exact, else float64.
        interleaved: pairs (2i, 2i + 1) instead of (i, i + R/2).
        exact: the frequencies are float32 numbers that give the same angles at every place tried.
        error: radians per token by which a frequency may be off.
        factor: of rotated dimensions, beside those that pass.
        of_long: those of texts longer than `switch`, where they depend on the length; else None.
        switch: tokens of the longest text that turns by `inv_freq`, where they do.
    """

    inv_freq: Array
    interleaved: bool
    exact: bool = False
    error: float = 0.0
    factor: float = 1.0
    of_long: Turning | None = None
    switch: int | None = None

    @property
    def rotary_dim(self) -> int:
        """R."""
        return 2 * len(self.inv_freq)

    def with_factor(self, factor: float) -> Turning:
        """Return the same with another factor."""
        return replace(self, factor=factor)


def measure_turning(attention: Attention) -> Turning | None:
    """Find out how an attention rotates its keys.

    Raises:
        ModelError: what it does to them is no rotation of pairs at fixed speeds.
    """
    name = attention.anchor.name
    total = attention.reach
    new = min(_TOKENS, total)
    key = _random(attention, new)
    turned = attention.cached_keys(key, 0)
    far = attention.cached_keys(key[:, :, :1], total - 1)
    still = max(_STILL, attention.eps)
    moving = _moving(key, turned, still) | _moving(key[:, :, :1], far, still)
    if not moving.any():
        return None
    pairing = _pairing(key, turned, moving, max(_TOLERANCE, 2 * attention.eps))
    if pairing is None:
        raise ModelError(f"{name} does something else to its keys than rotate pairs of dimensions")
    protractor = _Protractor(attention, *pairing)
    speeds = _speeds(protractor.angles(key, 0))
    return _along(protractor, speeds, total)


@dataclass(frozen=True)
class _Protractor:
    """Measures the angles by which pairs are turned."""

    attention: Attention
    interleaved: bool
    dims: int

    def angles(self, key: Array, past: int) -> Array:
        """Return the angles (S, R/2) of keys behind others, those of position 0 taken off."""
        found = self.attention.cached_keys(key, past)
        return np.angle(_turns(key, found, self.interleaved, self.dims)) - self.start

    def at(self, place: int) -> Array:
        """Return the angles (R/2,) at a position, of a text that ends there."""
        return self.angles(_random(self.attention, 1), place)[0]

    @cached_property
    def start(self) -> Array:
        """The angles at position 0: 0, or π where a factor is negative."""
        key = _random(self.attention, 1)
        found = self.attention.cached_keys(key, 0)
        return np.angle(_turns(key, found, self.interleaved, self.dims))[0]


def _along(protractor: _Protractor, speeds: Array, total: int) -> Turning:
    """Make speeds better at growing distances; find where they change, if they do."""
    places: list[int] = []
    angles: list[Array] = []
    place = _TOKENS - 1
    while place < total - 1:
        place = min(2 * place, total - 1)
        measured = protractor.at(place)
        error = _wrapped(measured - speeds * place)
        if np.abs(error).max() > _SLACK:
            return _of_two_lengths(protractor, speeds, places[-1] if places else 0, place, total)
        places.append(place)
        angles.append(measured)
        speeds = speeds + np.where(np.abs(speeds) * place < _COARSE, error / place, 0.0)
    return _turning(protractor, speeds, places, angles)


def _turning(
    protractor: _Protractor, speeds: Array, places: list[int], angles: list[Array]
) -> Turning:
    eps = max(protractor.attention.eps, 2.0**-23)
    if not places:
        return Turning(speeds, protractor.interleaved, error=eps / (_TOKENS - 1))
    exact = _exact(speeds, np.array(places), np.array(angles))
    if exact is not None:
        return Turning(exact, protractor.interleaved, exact=True)
    return Turning(speeds, protractor.interleaved, error=2 * eps / min(places[-1], _COARSE))


def _of_two_lengths(
    protractor: _Protractor, speeds: Array, before: int, behind: int, total: int
) -> Turning:
    """Return the rotation of a graph that turns long texts otherwise than short ones."""

    def is_short(place: int) -> bool:
        error = _wrapped(protractor.at(place) - speeds * place)
        return bool(np.abs(error).max() <= _SLACK)

    while behind - before > 1:
        middle = (before + behind) // 2
        before, behind = (middle, behind) if is_short(middle) else (before, middle)
    # The last text of short ones ends at position `before`. Near it angles are finest.
    count = min(_FAR_TOKENS, total)
    key = _random(protractor.attention, count)
    angles = protractor.angles(key, min(behind, total - count))
    far = _speeds(angles - angles[0])
    place = behind
    while True:
        error = _wrapped(protractor.at(place) - far * place)
        if np.abs(error).max() > _SLACK:
            raise ModelError(
                f"{protractor.attention.anchor.name} rotates at other speeds from {behind + 1} "
                f"tokens on, and at others again from {place + 1}; expected one speed for short "
                f"texts and one for long ones"
            )
        if place == total - 1:
            break
        far = far + error / place
        place = min(2 * place, total - 1)
    places = [n for n in (behind, total - 1) if n < _COARSE] or [behind]
    short_places = [n for n in (before // 2, before) if n > 0]
    short = _turning(
        protractor, speeds, short_places, [protractor.at(place) for place in short_places]
    )
    long = _turning(protractor, far, places, [protractor.at(place) for place in places])
    return replace(short, of_long=long, switch=before + 1)


def _random(attention: Attention, tokens: int) -> Array:
    rng = np.random.default_rng(tokens)
    shape = (1, attention.kv_heads, tokens, attention.head_dim)
    return rng.standard_normal(shape).astype(np.float32)


def _pairing(key: Array, found: Array, moving: Array, tolerance: float) -> tuple[bool, int] | None:
    """Return whether pairs are interleaved, and R; None if no pairing fits."""
    dims = key.shape[-1]
    least = int(np.flatnonzero(moving).max()) + 1
    least += least % 2
    candidates = [(False, rotated) for rotated in range(least, dims + 1, 2)] + [(True, least)]
    fitting = (pair for pair in candidates if _fits(key, found, *pair, tolerance))
    return next(fitting, None)


def _moving(key: Array, found: Array, still: float) -> Array:
    """Say of each dimension (D,) whether it is more than a multiple of what it was."""
    factor = (key * found).sum((0, 1, 2)) / (key * key).sum((0, 1, 2))
    error = np.abs(found - factor * key).max((0, 1, 2))
    return error > still * np.abs(found).max()


def _pairs(array: Array, interleaved: bool, dims: int) -> Array:
    """Return the pairs of the rotated dimensions as complex numbers (…, R/2)."""
    rotated = array[..., :dims].astype(np.float64)
    if interleaved:
        return rotated[..., 0::2] + 1j * rotated[..., 1::2]
    return rotated[..., : dims // 2] + 1j * rotated[..., dims // 2 :]


def _turns(key: Array, found: Array, interleaved: bool, dims: int) -> Array:
    """Return the factor (S, R/2) of each pair at each token that fits all heads best."""
    before, after = _pairs(key, interleaved, dims), _pairs(found, interleaved, dims)
    return (before.conj() * after).sum((0, 1)) / (abs(before) ** 2).sum((0, 1))


def _fits(key: Array, found: Array, interleaved: bool, dims: int, tolerance: float) -> bool:
    before, after = _pairs(key, interleaved, dims), _pairs(found, interleaved, dims)
    # Turned numbers keep their lengths, up to one factor; heads turn alike.
    factor = np.median(abs(after) / abs(before))
    same_length = np.abs(abs(after) - factor * abs(before)).max() <= tolerance * abs(after).max()
    turns = _turns(key, found, interleaved, dims)
    alike = np.abs(after - turns * before).max() <= tolerance * abs(after).max()
    return bool(same_length and alike)


def _speeds(angles: Array) -> Array:
    """Return radians per token (R/2,) from angles (S, R/2) at places 0 … S − 1."""
    speeds = angles[1]
    distance = 1
    while 2 * distance < len(angles):
        distance *= 2
        expected = speeds * distance
        speeds = (expected + _wrapped(angles[distance] - expected)) / distance
    return speeds


def _wrapped(angle: Array) -> Array:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _exact(speeds: Array, places: Array, angles: Array) -> Array | None:
    """Return the float32 frequencies whose float32 angles are those measured, None if none are."""
    near = speeds.astype(np.float32)
    steps = np.arange(-_ULPS, _ULPS + 1, dtype=np.int32)
    candidates = (near.view(np.int32)[:, None] + steps).view(np.float32)  # (R/2, 2·ULPS + 1)
    product = places.astype(np.float32)[:, None, None] * candidates  # as a graph multiplies
    error = np.abs(_wrapped(product.astype(np.float64) - angles[:, :, None])).max(0)
    if error.min(1).max() > _STILL:
        return None
    best = np.where(error <= error.min(1, keepdims=True) + 1e-7, np.abs(steps), _ULPS + 1).argmin(1)
    return candidates[np.arange(len(near)), best]
