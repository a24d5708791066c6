"""Measure every supported family: against stock transformers, and an oracle far beyond the window.

    python -m benchmarks.evaluation.families                  all of them
    python -m benchmarks.evaluation.families cwm --engine     one, with a TensorRT-RTX engine

Repeats the checks of the tests and keeps the results in benchmarks/results/models.json, from which
`scripts/docs/write_all.py` writes docs/models.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support import own_families as own
from benchmarks.support.families import CASES, FamilyCase
from benchmarks.support.family_check import check_family, stock_error
from lminf_export import LminfError, export

RESULTS = Path(__file__).resolve().parents[1] / "results" / "models.json"

# What the families without the attention interface have, beside what their tests measure.
OWN = {
    "gptj": ("partial interleaved rotary", "parallel blocks"),
    "codegen": ("partial interleaved rotary", "fused projections in four parts"),
    "mpt": ("ALiBi", "clipped fused projections"),
    "bloom": ("ALiBi", "norm after the embeddings; needs `--window-size`"),
    "falcon-7b": ("rotary", "one key/value head, parallel blocks"),
    "falcon-40b": ("rotary", "grouped heads, two norms side by side"),
    "falcon-rw": ("ALiBi", "slopes times the logits' scale"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="rows of the table; default: all")
    parser.add_argument("--engine", action="store_true", help="build TensorRT-RTX engines too")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    rows = results["rows"]
    for name, measure in jobs().items():
        if options.names and name not in options.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder))
            if options.engine:
                found["engine"] = try_engine(Path(folder))
        rows[name] = {**rows.get(name, {}), **found}
        print(name, rows[name], flush=True)
        results["versions"] = versions()
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def jobs() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Return for each row of the table what measures it in an empty folder."""
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for case in CASES:
        found[case.model_type] = lambda folder, case=case: measure_case(case, folder)
    for name in own.CASES:
        found[name] = lambda folder, name=name: measure_own(name, folder)
    return found


def measure_case(case: FamilyCase, folder: Path) -> dict[str, Any]:
    errors = check_family(case, folder)
    return {
        "position": case.position,
        "special": case.special,
        "stock": errors.stock,
        "oracle": max(errors.token_by_token, errors.in_chunks),
    }


def measure_own(name: str, folder: Path) -> dict[str, Any]:
    exported = own.export_case(name, folder)
    rng = np.random.default_rng(3)
    streams = [
        own.decode(exported, lambda remaining: np.array([1, 1])),
        own.decode(exported, lambda remaining: rng.integers(0, 3 * own.CHUNK, 2)),
    ]
    errors = [
        own.error(logits, wanted)
        for stream in streams
        for logits, wanted in zip(stream, exported.wanted, strict=True)
    ]
    position, special = OWN[name]
    return {
        "position": position,
        "special": special,
        "stock": stock_error(
            exported.model, exported.folder, None, exported.texts[0][: own.WINDOW]
        ),
        "oracle": max(errors),
    }


def try_engine(folder: Path) -> str:
    """Build an engine of the model in folder/m; return "yes" or the reason in one line."""
    try:
        export(
            folder / "m",
            folder / "e" / "engine.plan",
            builder="tensorrt-rtx",
            window_size=32,
            chunk_size=16,
        )
    except LminfError as error:
        return str(error).splitlines()[0]
    return "yes"


def versions() -> dict[str, str]:
    names = ("transformers", "torch", "onnxruntime")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
