"""Weights packed into words of 32 bits: GPTQ, AWQ (gemm) and compressed-tensors' pack-quantized.

A weight is (number − zero) · scale, with a zero and a scale for each output and each group of
inputs. The formats differ in the dimension along which words are packed, in the order of numbers
within a word, and in the offset of the zeros:

- GPTQ: `qweight` (in · bits / 32, out), `qzeros` (groups, out · bits / 32), `scales` (groups, out),
  `g_idx` (in,), the group of each input (with act-order groups are scattered). The first version
  of the format stores zeros less one.
- AWQ gemm: `qweight` (in, out / 8), `qzeros` (groups, out / 8), `scales` (groups, out); the eight
  numbers of a word stand in the order 0 2 4 6 1 3 5 7.
- pack-quantized: `weight_packed` (out, in · bits / 32), `weight_scale` (out, groups),
  `weight_zero_point` (out · bits / 32, groups) or none, `weight_g_idx` (in,) or none; numbers and
  zeros are offset by 2^(bits − 1).

The model's weight is (out, in) in all of them. A number never crosses a word here; those of three
bits do, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lminf_export.checkpoint.dequantize.common import Found, require
from lminf_export.errors import ModelError
from lminf_export.tensors.lazy import LazyTensor
from lminf_export.tensors.stored import RawTensor

_WORD = 32
_BITS = (2, 4, 8)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find_gptq(checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any]) -> Found:
    """Describe every GPTQ matrix of a checkpoint.

    Args:
        checkpoint: its tensors.
        settings: `checkpoint_format` "gptq" (zeros less one) or "gptq_v2".

    Raises:
        ModelError: parts are missing or do not fit, or numbers have a size that is not read.
    """
    version = settings.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ModelError(
            f"checkpoint_format {version!r} of this GPTQ checkpoint is not read; expected gptq or "
            f"gptq_v2: export the unquantised checkpoint instead"
        )
    found = Found()
    for base, names in _matrices(checkpoint, ("qweight", "qzeros", "scales")):
        words, zeros, scales = (checkpoint[name] for name in names)
        if len(words.shape) != 2 or len(scales.shape) != 2:
            found.check(False, names[0], names[2], checkpoint)
        bits = _bits(zeros.shape[-1], scales.shape[1], names[1])
        group_name = f"{base}.g_idx"
        groups = checkpoint.get(group_name)
        inputs = words.shape[0] * _WORD // bits
        found.check(words.shape[1] == scales.shape[1], names[0], names[2], checkpoint)
        found.check(zeros.shape[0] == scales.shape[0], names[1], names[2], checkpoint)
        if groups is not None:
            found.check(groups.shape == (inputs,), group_name, names[0], checkpoint)
        tensor = GptqMatrix(words, zeros, scales, groups, bits, int(version == "gptq"))
        found.add(f"{base}.weight", tensor, *names, group_name)
    return found


def find_awq(checkpoint: Mapping[str, RawTensor], settings: Mapping[str, Any]) -> Found:
    """Describe every AWQ matrix of a checkpoint.

    Args:
        checkpoint: its tensors.
        settings: `version`, "gemm"; `bits`, 4.

    Raises:
        ModelError: parts are missing or do not fit, or the layout is another.
    """
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise ModelError(
            f"AWQ checkpoints are read in the gemm layout with 4 bits; this one has {version} with "
            f"{bits}: export the unquantised checkpoint instead"
        )
    found = Found()
    for base, names in _matrices(checkpoint, ("qweight", "qzeros", "scales")):
        words, zeros, scales = (checkpoint[name] for name in names)
        fits = (
            len(words.shape) == len(zeros.shape) == len(scales.shape) == 2
            and words.shape[1] * 8 == scales.shape[1]
            and words.shape[0] % scales.shape[0] == 0
            and zeros.shape == (scales.shape[0], words.shape[1])
        )
        found.check(fits, names[0], names[2], checkpoint)
        found.add(f"{base}.weight", AwqMatrix(words, zeros, scales), *names)
    return found


def find_pack_quantized(checkpoint: Mapping[str, RawTensor], _: Mapping[str, Any]) -> Found:
    """Describe every pack-quantized matrix of a checkpoint of compressed-tensors.

    Raises:
        ModelError: parts are missing or do not fit.
    """
    found = Found()
    for base, names in _matrices(checkpoint, ("weight_packed", "weight_scale", "weight_shape")):
        words, scales, shape = (checkpoint[name] for name in names)
        out, inputs = (int(x) for x in shape.part())
        zero_name, group_name = f"{base}.weight_zero_point", f"{base}.weight_g_idx"
        zeros, groups = checkpoint.get(zero_name), checkpoint.get(group_name)
        sizes = [bits for bits in _BITS if words.shape == (out, -(-inputs * bits // _WORD))]
        found.check(bool(sizes) and scales.shape[0] in (1, out), names[0], names[1], checkpoint)
        bits = sizes[0]
        if zeros is not None:
            wanted = (-(-out * bits // _WORD), *scales.shape[1:])
            found.check(zeros.shape == wanted, zero_name, names[1], checkpoint)
        tensor = PackedMatrix(words, zeros, scales, groups, bits, (out, inputs))
        found.add(f"{base}.weight", tensor, *names, zero_name, group_name)
    return found


def _matrices(
    checkpoint: Mapping[str, RawTensor], parts: tuple[str, ...]
) -> list[tuple[str, list[str]]]:
    """Return for each module that has the first part the names of all of them."""
    found = []
    for name in checkpoint:
        base, _, last = name.rpartition(".")
        if last == parts[0]:
            names = [f"{base}.{part}" for part in parts]
            for other in names:
                require(checkpoint, other, name)
            found.append((base, names))
    return found


def _bits(words: int, outputs: int, name: str) -> int:
    bits = words * _WORD / outputs
    if bits not in _BITS:
        raise ModelError(
            f"{name} holds numbers of {bits:g} bits; read are 2, 4 and 8: export the unquantised "
            f"checkpoint instead"
        )
    return int(bits)


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Split int32 words into the numbers they hold, lowest bits first, along a dimension."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    split = (words.unsqueeze(dim + 1) >> shifts.reshape(-1, *[1] * (words.dim() - dim - 1))) & (
        2**bits - 1
    )
    return split.flatten(dim, dim + 1)


@dataclass(frozen=True)
class GptqMatrix(LazyTensor):
    """A weight (out, in); `added` is the offset that the format subtracts from its zeros."""

    words: RawTensor
    zeros: RawTensor
    scales: RawTensor
    groups: RawTensor | None
    bits: int
    added: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.words.shape[1], self.words.shape[0] * _WORD // self.bits

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the columns of these outputs; words of zeros may hold their neighbours too."""
        number = unpacked(self.words.part(slice(None), slice(start, stop)), self.bits, 0)
        each = _WORD // self.bits
        first = start // each
        zero = unpacked(self.zeros.part(slice(None), slice(first, -(-stop // each))), self.bits, 1)
        zero = zero[:, start - first * each : stop - first * each]
        # A zero of 0 less 1 was stored with all bits set; the mask undoes that.
        zero = (zero + self.added) & (2**self.bits - 1)
        scale = self.scales.part(slice(None), slice(start, stop)).to(torch.float32)
        group = self._groups()
        return ((number - zero[group]).to(torch.float32) * scale[group]).T

    def _groups(self) -> torch.Tensor:
        """Return the group of each input (in,)."""
        if self.groups is not None:
            return self.groups.part().long()
        size = self.shape[1] // self.scales.shape[0]
        return torch.arange(self.shape[1]) // size


@dataclass(frozen=True)
class AwqMatrix(LazyTensor):
    """A weight (out, in) of 4 bits."""

    words: RawTensor
    zeros: RawTensor
    scales: RawTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.scales.shape[1], self.words.shape[0]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the columns of words that hold these outputs."""
        columns = slice(start // 8, -(-stop // 8))
        number, zero = (_awq(x.part(slice(None), columns)) for x in (self.words, self.zeros))
        scale = self.scales.part(slice(None), slice(columns.start * 8, columns.stop * 8))
        size = self.words.shape[0] // self.scales.shape[0]
        zero, scale = (x.repeat_interleave(size, 0) for x in (zero, scale.to(torch.float32)))
        values = (number - zero).to(torch.float32) * scale
        return values[:, start - columns.start * 8 : stop - columns.start * 8].T


def _awq(words: torch.Tensor) -> torch.Tensor:
    """Split words (rows, words) into (rows, 8 · words), in the order of the outputs."""
    numbers = unpacked(words, 4, 1).unflatten(1, (-1, 8))
    place = torch.tensor(_AWQ_ORDER).argsort()
    return numbers[:, :, place].flatten(1)


@dataclass(frozen=True)
class PackedMatrix(LazyTensor):
    """A weight (out, in) of compressed-tensors."""

    words: RawTensor
    zeros: RawTensor | None
    scales: RawTensor
    groups: RawTensor | None
    bits: int
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self.size

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the rows of words."""
        inputs, offset = self.size[1], 2 ** (self.bits - 1)
        number = unpacked(self.words.part(slice(start, stop)), self.bits, 1)[:, :inputs] - offset
        one = self.scales.shape[0] == 1  # for the whole tensor
        scale = self.scales.part(slice(None) if one else slice(start, stop)).to(torch.float32)
        if scale.dim() == 1:
            scale = scale[:, None]
        if self.groups is not None:
            group = self.groups.part().long()
        else:
            group = torch.arange(inputs) // -(-inputs // scale.shape[1])
        if self.zeros is not None:
            each = _WORD // self.bits
            first = start // each
            zero = unpacked(self.zeros.part(slice(first, -(-stop // each))), self.bits, 0) - offset
            number = number - zero[start - first * each : stop - first * each][:, group]
        return number.to(torch.float32) * scale[:, group]
