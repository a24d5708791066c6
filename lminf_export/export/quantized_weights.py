"""The part of the manifest, and of the notices, that is about single quantised weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lminf_export.bundle.records import Quantization, TensorBlocks
from lminf_export.export.passes.choose_weights import Quantized
from lminf_export.quantize.kept import block_type
from lminf_export.quantize.stored import QuantizedWeight


def with_blocks(record: Quantization | None, pieces: Sequence[Quantized]) -> Quantization | None:
    """Return the manifest's record with every weight in blocks."""
    if record is None:
        return None
    tensors = {p.name: _blocks(p) for p in pieces if isinstance(p, QuantizedWeight)}
    return record.model_copy(update={"tensors": tensors})


def _blocks(piece: QuantizedWeight) -> TensorBlocks:
    return TensorBlocks.model_validate(
        {
            "bits": piece.form.bits,
            "block_size": piece.form.block_size,
            "method": piece.method,
            "source_type": block_type(piece.tensor) if piece.method == "keep" else None,
        }
    )


def kept_notices(pieces: Sequence[Quantized]) -> list[str]:
    """Say of weights that came in blocks how many keep their values; nothing where none did."""
    types = [(block_type(piece.tensor), _is_kept(piece)) for piece in pieces]
    kept = Counter(kind for kind, keeps in types if kind and keeps)
    again = Counter(kind for kind, keeps in types if kind and not keeps)
    if not kept and not again:
        return []
    said = [f"{sum(kept.values())} weights keep the values of the GGUF file ({_counts(kept)})"]
    if again:
        said.append(f"{sum(again.values())} are requantised ({_counts(again)})")
    return [", ".join(said if kept else said[1:])]


def _is_kept(piece: Quantized) -> bool:
    return isinstance(piece, QuantizedWeight) and piece.method == "keep"


def _counts(types: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))


def calibrated_notices(asked: bool, pieces: Sequence[Quantized]) -> list[str]:
    """Say how many weights of 4 bits a calibration reached; nothing where none was asked for."""
    fours = [p for p in pieces if isinstance(p, QuantizedWeight) and p.form.bits == 4]
    own = [piece for piece in fours if piece.method != "keep"]
    if not asked:
        return []
    count = sum(piece.method == "calibrate" for piece in own)
    return [f"{count} of {len(own)} weights of 4 bits are calibrated on the text"]
