"""Perplexity and bytes of Gemma 3 270M in few bits: exports of ours, and llama.cpp's own files.

Every row reads the same tokens of held-out text. Costs are ratios to the same code without
quantisation: to the float32 export for ours, which see a window and starting tokens, and to the
float32 file for llama.cpp, which sees everything. The weights are those that the package holds in
Q4_K_M, so its file is quantised for the second time by every row but two.

    python -m benchmarks.real.int4 --gguf FILE --model DIR --out benchmarks/results/real/int4.json

LMINF_LLAMA_PYTHON names the Python that has llama-cpp-python; without it, and without the model,
rows are left out, and said so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lminf_export
from benchmarks.support.result import write_result
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.runtime.environment import environment
from lminf_export.verify.bundle_run import BundleRun
from lminf_export.verify.likelihood import negative_log_likelihood
from lminf_export.verify.perplexity_cost import cost_of

TEXTS = Path(__file__).resolve().parents[2] / "examples" / "demo-llama"
EVALUATED, CALIBRATION = TEXTS / "heldout-austen.txt", TEXTS / "heldout.txt"
WINDOW, PIECE = 1024, 64
BEFORE = QuantizeConfig(
    "int4", symmetric=True, scales="range", block_size=32, mixed="off", lm_head="same"
)
LLAMA_TYPES = ("F32", "Q4_0", "Q4_K_M")


@dataclass(frozen=True)
class Row:
    """An export.

    Attributes:
        name: of the row.
        quantize: its settings.
        from_gguf: of the file's own blocks, not of the float32 weights.
        calibrate: text to calibrate on.
    """

    name: str
    quantize: str | QuantizeConfig | None
    from_gguf: bool = False
    calibrate: Path | None = None


ROWS = (
    Row("float32", None),
    Row("int8", "int8"),
    Row("int4 as before", BEFORE),
    Row("int4 as before, asymmetric", QuantizeConfig(**{**vars(BEFORE), "symmetric": False})),
    Row("int4, blocks of 32 alone", QuantizeConfig("int4", block_size=32, mixed="off")),
    Row("int4", "int4"),
    Row("int4, calibrated", "int4", calibrate=CALIBRATION),
    Row("int4 of the file's blocks", "int4", from_gguf=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of the float32 weights")
    parser.add_argument("--gguf", type=Path, help="the package's file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not any(path and path.exists() for path in (arguments.model, arguments.gguf)):
        print("skipped: neither --model nor --gguf names weights that are here", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="lminf-int4-") as work:
        rows: list[dict[str, Any]] = []
        for row in measured(arguments, Path(work)):
            rows.append(row)
            write_result(arguments.out, _record(rows, arguments.tokens))


def measured(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Yield every row for which there are weights here; say which are skipped."""
    full: NDArray[np.float64] | None = None
    tokens: NDArray[np.int64] | None = None
    for row in ROWS:
        source = arguments.gguf if row.from_gguf else arguments.model
        if source is None or not source.exists():
            print(f"skipped {row.name}: no weights here", file=sys.stderr)
            continue
        size, tokens, nats = _export(row, source, work, arguments.tokens)
        full = nats if row.quantize is None else full
        yield _result(row.name, size, nats, full)
    python = os.environ.get("LMINF_LLAMA_PYTHON")
    if python is None or arguments.gguf is None or tokens is None:
        print("skipped llama.cpp: no LMINF_LLAMA_PYTHON or no --gguf", file=sys.stderr)
        return
    yield from _llama(python, arguments.gguf, work, tokens)


def _record(rows: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    return {
        "benchmark": "int4",
        "model": "Gemma 3 270M",
        "text": EVALUATED.name,
        "calibration_text": CALIBRATION.name,
        "tokens": tokens,
        "window_size": WINDOW,
        "rows": rows,
        **environment(),
    }


def _export(
    row: Row, source: Path, work: Path, count: int
) -> tuple[int, NDArray[np.int64], NDArray[np.float64]]:
    """Export, and return the bytes of weights, the tokens, and the nats of all but the first."""
    bundle = lminf_export.export(
        source,
        work / "bundle",
        quantize=row.quantize,
        calibrate=row.calibrate,
        window_size=WINDOW,
        force=True,
    )
    model = lminf_export.load(bundle.path)
    text = EVALUATED.read_text(encoding="utf-8")
    tokens = np.asarray(model.codec.encode(text[: 8 * count])[:count], np.int64)
    files = bundle.manifest.files
    size = sum(files[name].bytes for name in bundle.manifest.files_of("weights"))
    logits = BundleRun(model, tokens, (PIECE,)).rows(count - 1)
    return size, tokens, _nats(logits, tokens)


def _nats(logits: Iterator[NDArray[np.float32]], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    found, start = [], 1
    for rows in logits:
        targets = tokens[start : start + len(rows)]
        found.append(negative_log_likelihood(rows, targets, np.float64))
        start += len(rows)
    return np.concatenate(found)


def _result(
    name: str, size: int, nats: NDArray[np.float64], full: NDArray[np.float64] | None
) -> dict[str, Any]:
    cost = None if full is None else cost_of(full, nats)
    return {
        "name": name,
        "weights_bytes": size,
        "perplexity": float(np.exp(nats.mean())),
        "cost": None if cost is None else cost.cost,
        "standard_error": None if cost is None else cost.standard_error,
    }


def _llama(
    python: str, gguf: Path, work: Path, tokens: NDArray[np.int64]
) -> Iterator[dict[str, Any]]:
    """Yield llama.cpp's rows: files that it makes of the package's, and the package's own."""
    np.save(work / "tokens.npy", tokens)
    worker = Path(__file__).with_name("llama_perplexity.py")
    full = None
    files = {name: work / f"{name}.gguf" for name in LLAMA_TYPES}
    for name, path in {**files, "Q4_K_M, the package's file": gguf}.items():
        made_of = [str(gguf if name == "F32" else files["F32"]), name] if path != gguf else []
        words = [python, str(worker), str(path), str(work / "tokens.npy"), str(work / "nats.npy")]
        subprocess.run([*words, *made_of], check=True, stdout=sys.stderr)
        nats = np.load(work / "nats.npy")
        full = nats if full is None else full
        yield _result(f"llama.cpp {name}", path.stat().st_size, nats, full)


if __name__ == "__main__":
    main()
