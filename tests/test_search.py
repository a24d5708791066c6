"""Searched scales of 4-bit blocks: never worse than a block's range, on any numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lminf_export.quantize.formats import BlockFormat, as_signed, dequantize_rows, quantize_rows
from lminf_export.quantize.search import rounded_rows, searched_rows
from lminf_export.quantize.stored import fits_half

WIDTH = 96


def weights(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, WIDTH, generator=generator)
    return {
        "normal": normal,
        "heavy tails": normal / torch.rand(64, WIDTH, generator=generator).clamp(min=1e-3),
        "one sign": normal.abs() + 3,
        "an outlier": normal + 40 * (torch.arange(WIDTH) % 32 == 5),
        "few levels": (normal * 2).round() / 8,
    }[kind]


def squares(found: np.ndarray, wanted: torch.Tensor, size: int) -> np.ndarray:
    """The squared error of every block."""
    error = np.square(found.astype(np.float64) - wanted.numpy())
    padded = np.pad(error, ((0, 0), (0, -error.shape[1] % size)))
    return padded.reshape(len(error), -1, size).sum(-1)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign", "an outlier", "few levels"])
def test_the_error_is_less_than_that_of_the_range(kind, symmetric, size):
    rows = weights(kind)
    form = BlockFormat(*rows.shape, 4, size, symmetric)
    blocks = searched_rows(rows, form, "float16")
    assert (blocks.zero_points is None) == symmetric
    found = squares(dequantize_rows(blocks, form), rows, size)
    before = squares(dequantize_rows(quantize_rows(rows, form), form), rows, size)
    slack = squares(np.zeros(rows.shape), rows, size) * 2.0**-18
    assert (found <= before + slack).all()  # block by block, but for the rounding of scales
    assert found.sum() <= before.sum() * (0.97 if kind == "normal" else 1) + slack.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [1, 5, 33, 64])
def test_rows_that_end_within_a_block_are_quantised(columns, symmetric):
    rows = torch.randn(7, columns, generator=torch.Generator().manual_seed(1))
    form = BlockFormat(7, columns, 4, 32, symmetric)
    blocks = searched_rows(rows, form, "float32")
    assert (blocks.packed.shape, blocks.scales.shape) == (form.packed_shape, form.scales_shape)
    if not symmetric:
        assert blocks.zero_points.shape == form.zero_points_shape
    error = np.abs(dequantize_rows(blocks, form) - rows.numpy())
    assert (error <= np.abs(blocks.scales).max() * 1.5).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, -1e30, 1e-42])
def test_blocks_of_one_value_keep_it(value, symmetric):
    rows = torch.full((2, 64), value)
    form = BlockFormat(2, 64, 4, 32, symmetric)
    blocks = searched_rows(rows, form, "float32")
    assert np.isfinite(blocks.scales).all()
    limit = abs(value) * 1e-6 if abs(value) > 1e-37 else 1e-37
    assert np.abs(dequantize_rows(blocks, form) - value).max() <= limit


def test_engines_get_scales_of_one_sign_and_the_same_integers():
    form = BlockFormat(64, WIDTH, 4, 32, symmetric=True)
    rows = weights("normal")
    blocks = searched_rows(rows, form, "float32", positive=True)
    assert (blocks.scales > 0).all()
    assert as_signed(blocks.packed, form).shape == (64, WIDTH // 2)


@pytest.mark.parametrize(
    ("scale", "fits"), [(1.0, True), (1e-6, False), (1e7, False), (0.0, True), (1e-2, True)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_float16_where_it_holds_them(scale, fits, bits):
    class Source:
        dtype, shape = "F32", (64, WIDTH)

        def blocks(self):
            yield (weights("normal") * scale).flatten()

        def at(self, index):
            raise NotImplementedError

    assert fits_half(Source(), BlockFormat(64, WIDTH, bits, 32, True)) is fits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [5, 96])
def test_blocks_of_8_bits_are_rounded_to_the_scales_that_are_stored(columns, symmetric):
    rows = weights("heavy tails")[:, :columns]
    form = BlockFormat(64, columns, 8, 32, symmetric)
    blocks = rounded_rows(rows, form, "float16")
    assert blocks.packed.shape == form.packed_shape
    assert np.array_equal(blocks.scales.astype(np.float16), blocks.scales)
    level = blocks.scales.repeat(32, 1)[:, :columns]
    # The ends of a range may lie a little beyond what a rounded scale reaches.
    error = np.abs(dequantize_rows(blocks, form) - rows.numpy())
    assert (error <= 0.57 * level + 1e-12).all()
