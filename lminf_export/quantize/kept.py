"""Blocks of a GGUF file taken over with the values that they have, as blocks of 4 or 8 bits.

A row of a GGUF tensor is a sequence of blocks of bytes. What a block stands for is affine in its
integers for every type here: weight = scale · (integer − centre) + offset, and so are the blocks of
`quantize.formats`. Integers of more than 4 bits, and those of tables of 16 values, become 8-bit
ones. Scales that the file holds as float16 stay float16; products of a scale of a scale are
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lminf_export.quantize.formats import BlockFormat, Blocks, packed_integers
from lminf_export.tensors.gguf_blocks import GgufTensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Parts:
    """The numbers of blocks: integers less their centre, scales, and offsets if there are any.

    Attributes:
        integers: (…, block size) int16, −8 … 7 or −128 … 127.
        scales: (…).
        offsets: (…); None for none.
    """

    integers: NDArray[np.int16]
    scales: Floats
    offsets: Floats | None = None


@dataclass(frozen=True)
class KeptType:
    """How the blocks of one GGUF type are kept.

    Attributes:
        elements: of a block of the file.
        num_bytes: of a block of the file.
        bits: of an integer here.
        block_size: elements that share a scale.
        offsets: blocks have offsets.
        scales: element type that holds every scale exactly.
        read: from blocks (B, bytes) to their parts (B · elements / block size, …).
    """

    elements: int
    num_bytes: int
    bits: int
    block_size: int
    offsets: bool
    scales: str
    read: Callable[[Bytes], _Parts]

    def form(self, rows: int, columns: int) -> BlockFormat:
        """Return the format of a matrix."""
        return BlockFormat(rows, columns, self.bits, self.block_size, True, self.offsets)


def block_type(tensor: object) -> str | None:
    """Return GGUF's name of the type of a matrix' own blocks; None where it has none."""
    if not isinstance(tensor, GgufTensor) or tensor.block_size == 1 or len(tensor.shape) != 2:
        return None
    return tensor.ggml_type


def kept_type(tensor: object) -> KeptType | None:
    """Return how a tensor's own blocks are kept; None where it has none that can be."""
    name = block_type(tensor)
    return None if name is None else KEPT_TYPES.get(name)


def kept_rows(tensor: GgufTensor, form: BlockFormat, count: int) -> Iterator[Blocks]:
    """Yield a matrix' own blocks, up to `count` rows at a time."""
    kind = KEPT_TYPES[tensor.ggml_type]
    for start in range(0, form.rows, count):
        yield kept_blocks(tensor.raw_rows(start, min(start + count, form.rows)), kind)


def kept_blocks(rows: Bytes, kind: KeptType) -> Blocks:
    """Return rows (R, bytes) of a GGUF type as blocks here."""
    count = len(rows)
    parts = kind.read(np.ascontiguousarray(rows).reshape(-1, kind.num_bytes))
    centred = parts.integers.reshape(count, -1, kind.block_size) + (1 << (kind.bits - 1))
    offsets = parts.offsets
    return Blocks(
        packed_integers(centred.astype(np.uint8), kind.bits),
        parts.scales.astype(np.float32).reshape(count, -1),
        None,
        None if offsets is None else offsets.astype(np.float32).reshape(count, -1),
    )


# --- pieces of blocks ---------------------------------------------------------------------------


def _halves(blocks: Bytes, at: int) -> Floats:
    """One float16 of each block, as float32 (B, 1)."""
    two = np.ascontiguousarray(blocks[:, at : at + 2])
    return two.view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> NDArray[np.int16]:
    """(…, n) bytes → (…, 2n) integers: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int16)


def _fifth_bits(blocks: Bytes, at: int) -> NDArray[np.int16]:
    """32 bits of each block, the lowest first: (B, 32)."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little")
    return bits.astype(np.int16)


def _groups(packed: Bytes, bits: int) -> NDArray[np.int16]:
    """(B, g, 32) bytes of 8 / bits integers → (B, g · 8 / bits, 32): group by group, low bits
    first.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = packed[:, :, None, :] >> shifts & ((1 << bits) - 1)
    return parts.reshape(len(packed), -1, packed.shape[-1]).astype(np.int16)


def _six_bits(packed: Bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """12 bytes of each block → 8 scales and 8 minima of 6 bits, (B, 8) each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scales, minima


# --- types --------------------------------------------------------------------------------------


def _q4_0(b: Bytes) -> _Parts:
    return _Parts(_nibbles(b[:, 2:]) - 8, _halves(b, 0))


def _q4_1(b: Bytes) -> _Parts:
    scale = _halves(b, 0)
    return _Parts(_nibbles(b[:, 4:]) - 8, scale, 8 * scale + _halves(b, 2))


def _q5_0(b: Bytes) -> _Parts:
    return _Parts((_nibbles(b[:, 6:]) | _fifth_bits(b, 2) << 4) - 16, _halves(b, 0))


def _q5_1(b: Bytes) -> _Parts:
    scale = _halves(b, 0)
    integers = _nibbles(b[:, 8:]) | _fifth_bits(b, 4) << 4
    return _Parts(integers - 16, scale, 16 * scale + _halves(b, 2))


def _q8_0(b: Bytes) -> _Parts:
    return _Parts(b[:, 2:].view(np.int8).astype(np.int16), _halves(b, 0))


def _q2_k(b: Bytes) -> _Parts:
    integers = _groups(b[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16) - 2
    scales = _halves(b, 80) * (b[:, :16] & 15)
    return _Parts(integers, scales, 2 * scales - _halves(b, 82) * (b[:, :16] >> 4))


def _q3_k(b: Bytes) -> _Parts:
    low = _groups(b[:, 32:96].reshape(-1, 2, 32), 2)
    high = _groups(b[:, None, :32], 1)
    packed = b[:, 96:108]
    fours = _nibbles(packed[:, :8])
    twos = _groups(packed[:, None, 8:], 2).reshape(-1, 16)
    scales = (fours | twos << 4) - 32
    return _Parts((low + 4 * high - 4).reshape(-1, 16, 16), _halves(b, 108) * scales)


def _q4_k(b: Bytes) -> _Parts:
    six, minima = _six_bits(b[:, 4:16])
    scales = _halves(b, 0) * six
    integers = _groups(b[:, 16:].reshape(-1, 4, 32), 4) - 8
    return _Parts(integers, scales, 8 * scales - _halves(b, 2) * minima)


def _q5_k(b: Bytes) -> _Parts:
    six, minima = _six_bits(b[:, 4:16])
    scales = _halves(b, 0) * six
    fifth = _groups(b[:, None, 16:48], 1)
    integers = (_groups(b[:, 48:].reshape(-1, 4, 32), 4) | fifth << 4) - 16
    return _Parts(integers, scales, 16 * scales - _halves(b, 2) * minima)


def _q6_k(b: Bytes) -> _Parts:
    low = b[:, :128].reshape(-1, 2, 2, 32)
    fours = np.concatenate([low & 15, low >> 4], axis=2).astype(np.int16)
    twos = _groups(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(fours.shape)
    integers = (fours | twos << 4).reshape(-1, 16, 16) - 32
    return _Parts(integers, _halves(b, 208) * b[:, 192:208].view(np.int8))


_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)


def _iq4_nl(b: Bytes) -> _Parts:
    return _Parts(_IQ4_VALUES[_nibbles(b[:, 2:])], _halves(b, 0))


def _iq4_xs(b: Bytes) -> _Parts:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = _halves(b, 0) * ((low | high << 4).astype(np.int16) - 32)
    return _Parts(_IQ4_VALUES[_nibbles(b[:, 8:].reshape(-1, 8, 16))], scales)


# Twice the values of E2M1, whose block has a power of two as its scale.
_E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)


def _mxfp4(b: Bytes) -> _Parts:
    scales = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    return _Parts(_E2M1_TWICE[_nibbles(b[:, 1:])], scales)


KEPT_TYPES: dict[str, KeptType] = {
    "Q4_0": KeptType(32, 18, 4, 32, False, "float16", _q4_0),
    "Q4_1": KeptType(32, 20, 4, 32, True, "float16", _q4_1),
    "Q5_0": KeptType(32, 22, 8, 32, False, "float16", _q5_0),
    "Q5_1": KeptType(32, 24, 8, 32, True, "float16", _q5_1),
    "Q8_0": KeptType(32, 34, 8, 32, False, "float16", _q8_0),
    "Q2_K": KeptType(256, 84, 4, 16, True, "float32", _q2_k),
    "Q3_K": KeptType(256, 110, 4, 16, False, "float32", _q3_k),
    "Q4_K": KeptType(256, 144, 4, 32, True, "float32", _q4_k),
    "Q5_K": KeptType(256, 176, 8, 32, True, "float32", _q5_k),
    "Q6_K": KeptType(256, 210, 8, 16, False, "float32", _q6_k),
    "IQ4_NL": KeptType(32, 18, 8, 32, False, "float16", _iq4_nl),
    "IQ4_XS": KeptType(256, 136, 8, 32, False, "float32", _iq4_xs),
    "MXFP4": KeptType(32, 17, 8, 32, False, "float32", _mxfp4),
}
