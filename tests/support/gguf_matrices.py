"""Matrices in blocks of GGUF types, with scales of an ordinary size, as tensors of a file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from lminf_export.tensors.gguf_blocks import GgufTensor, block_sizes
from lminf_export.tensors.gguf_header import read_gguf

# Where a block has float16 numbers, and how large weights are in units of them.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip
_MXFP4_EXPONENTS = (121, 125)


def random_blocks(kind: str, rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Return the bytes (rows, …) of a matrix whose weights have a deviation of about 1/16."""
    elements, size = next(rest for name, *rest in block_sizes().values() if name == kind)
    raw = rng.integers(0, 256, (rows, width // elements, size), dtype=np.uint8)
    for at in _HALVES[kind]:
        halves = rng.uniform(0.5, 1, (*raw.shape[:2], 1)) * rng.choice([-1, 1], (*raw.shape[:2], 1))
        raw[:, :, at : at + 2] = halves.astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        raw[:, :, 0] = rng.integers(*_MXFP4_EXPONENTS, raw.shape[:2])
    raw = raw.reshape(rows, -1)
    spread = gguf.dequantize(raw, Kind[kind]).std()
    for at in _HALVES[kind]:  # again, smaller
        blocks = raw.reshape(rows, -1, size)
        halves = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)
        blocks[:, :, at : at + 2] = (halves / np.float16(16 * spread)).view(np.uint8)
    return raw


def matrices(
    path: Path, kinds: dict[str, tuple[str, int, int]], seed: int = 0
) -> dict[str, GgufTensor]:
    """Write random matrices, name → (type, rows, columns), and return the file's tensors."""
    rng, writer = np.random.default_rng(seed), gguf.GGUFWriter(path, "llama")
    for name, (kind, rows, width) in kinds.items():
        writer.add_tensor(name, random_blocks(kind, rng, rows, width), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf(path).tensors
