"""Tensors of GGUF files: what is decoded, in which order, and the bytes of their blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lminf_export.tensors.gguf_blocks import block_sizes, readable_types
from lminf_export.tensors.gguf_header import read_gguf

ROWS, WIDTH = 24, 512
# Types that the package also writes; of the others, random bytes are blocks.
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "TQ2_0", "MXFP4")


def blocks_of(kind: str, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return the bytes of rows of a type: quantised from numbers, or random."""
    numbers = rng.standard_normal(shape, dtype=np.float32)
    if kind in ("F32", "F16"):
        return numbers.astype(np.float32 if kind == "F32" else np.float16)
    if kind in WRITTEN:
        return gguf.quantize(numbers, Kind[kind])
    size, count = next(rest for name, *rest in block_sizes().values() if name == kind)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // size * count), dtype=np.uint8)
    with np.errstate(all="ignore"):
        decoded = gguf.dequantize(raw, Kind[kind])
    raw[~np.isfinite(decoded).all(-1)] = 0  # scales that are no numbers
    return raw


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    """Write a file of nothing but tensors: name → (type, bytes or numbers)."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_type_of_the_issue_is_read():
    wanted = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"
    assert set(wanted.split()) <= set(readable_types())


@pytest.mark.parametrize("kind", readable_types())
def test_rows_are_those_of_the_library_whole_and_in_pieces(kind, tmp_path):
    data = blocks_of(kind, np.random.default_rng(0), ROWS, WIDTH)
    path = write(tmp_path / "m.gguf", {"a": ("F32", np.ones(3, np.float32)), "w": (kind, data)})
    tensor = read_gguf(path).tensors["w"]
    wanted = torch.from_numpy(np.array(gguf.dequantize(data, Kind[kind]))).float()
    assert tensor.ggml_type == kind
    assert tensor.shape == (ROWS, WIDTH)
    assert torch.equal(tensor.rows(0, ROWS), wanted)
    assert torch.equal(tensor.rows(5, 9), wanted[5:9])
    assert torch.equal(torch.cat(list(tensor.blocks())), wanted.flatten())
    assert np.array_equal(tensor.raw_rows(5, 9), data.view(np.uint8).reshape(ROWS, -1)[5:9])


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q6_K"])
def test_rows_in_another_order_keep_their_bytes(kind, tmp_path):
    rng = np.random.default_rng(1)
    data, order = blocks_of(kind, rng, ROWS, WIDTH), rng.permutation(ROWS)
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (kind, data)})).tensors["w"]
    moved = tensor.reordered(order)
    wanted = torch.from_numpy(np.array(gguf.dequantize(data, Kind[kind])))[order]
    assert torch.equal(moved.rows(0, ROWS), wanted)
    assert torch.equal(moved.rows(3, 5), wanted[3:5])
    assert np.array_equal(moved.raw_rows(2, 7), tensor.raw_rows(0, ROWS)[order[2:7]])
    again = moved.reordered(np.argsort(order))
    assert torch.equal(again.rows(0, ROWS), tensor.rows(0, ROWS))
    assert moved.as_stored() is None


@pytest.mark.parametrize("kind", ["F16", "MXFP4"])
def test_a_stack_is_read_at_any_of_its_parts(kind, tmp_path):
    data = blocks_of(kind, np.random.default_rng(2), 3, 4, 64)
    tensor = read_gguf(write(tmp_path / "m.gguf", {"w": (kind, data)})).tensors["w"]
    wanted = torch.from_numpy(np.array(gguf.dequantize(data, Kind[kind]))).float()
    assert tensor.shape == (3, 4, 64)
    assert tensor.num_rows == 12
    assert torch.equal(tensor.rows(1, 3), wanted[1:3])
    assert torch.equal(tensor.at(2).rows(0, 4), wanted[2])
    assert torch.equal(torch.cat(list(tensor.at(1).at(3).blocks())), wanted[1, 3])
    order = np.arange(12).reshape(3, 2, 2).swapaxes(1, 2).ravel()  # within each part
    inside = tensor.reordered(order).at(1)
    assert torch.equal(inside.rows(0, 4), wanted[1][[0, 2, 1, 3]])
    assert np.array_equal(inside.raw_rows(1, 2), tensor.raw_rows(6, 7))


def test_plain_numbers_can_be_copied_as_they_are(tmp_path):
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    file = read_gguf(write(tmp_path / "m.gguf", {"w": ("F32", numbers), "v": ("F32", numbers[0])}))
    stored = file.tensors["w"].as_stored()
    assert stored is not None
    assert torch.equal(stored.load(), torch.from_numpy(numbers))
    mixed = file.tensors["v"].reordered(np.array([2, 0, 1, 3]))
    assert torch.cat(list(mixed.blocks())).tolist() == [2, 0, 1, 3]
