"""Measure every supported family: against stock transformers, and an oracle far beyond the window.

    python -m benchmarks.evaluation.families                  all of them
    python -m benchmarks.evaluation.families cwm --engine     one, with a TensorRT-RTX engine
    python -m benchmarks.evaluation.families --quick --out F  all, on shorter texts, written to F

Repeats the checks of the tests and keeps the results in benchmarks/results/models.json, from which
`scripts/docs/write_all.py` writes docs/models.md. The quick form is what
`scripts/checks/dependency_matrix.py` runs with other versions of what the package depends on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from benchmarks.support import own_families as own
from benchmarks.support.families import CASES, FamilyCase
from benchmarks.support.family_check import (
    LENGTHS,
    QUICK_LENGTHS,
    export_family,
    measure_family,
    stock_error,
)
from lminf_export import LminfError, export

RESULTS = Path(__file__).resolve().parents[1] / "results" / "models.json"
# What a release of a dependency may end a family's check with.
FOREIGN = (
    *(LminfError, AssertionError, AttributeError, ImportError, KeyError, NotImplementedError),
    *(OSError, RuntimeError, TypeError, ValueError, StrictDataclassError),
)

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
    parser.add_argument("--quick", action="store_true", help="shorter texts; needs --out")
    parser.add_argument("--out", type=Path, help="where the quick form writes")
    options = parser.parse_args()
    if options.quick:
        quick(options.names, options.out)
        return
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


def quick(names: list[str], out: Path) -> None:
    """Measure rows on shorter texts, in one process; write what each gave, or its error."""
    rows: dict[str, Any] = {}
    made_with = versions("onnx", "onnx-ir", "onnxscript", "huggingface_hub", "tokenizers")
    for name, measure in jobs(is_quick=True).items():
        if names and name not in names:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measure(Path(folder))
                rows[name] = {"stock": found["stock"], "oracle": found["oracle"]}
            except FOREIGN as error:
                rows[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        rows[name]["seconds"] = round(time.perf_counter() - start, 2)
        print(name, rows[name], flush=True)
        out.write_text(json.dumps({"versions": made_with, "rows": rows}, indent=1) + "\n")


def jobs(*, is_quick: bool = False) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Return for each row of the table what measures it in an empty folder."""
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for case in CASES:
        found[case.model_type] = partial(measure_case, case, is_quick=is_quick)
    for name in own.CASES:
        found[name] = partial(measure_own, name, is_quick=is_quick)
    return found


def measure_case(case: FamilyCase, folder: Path, *, is_quick: bool = False) -> dict[str, Any]:
    export_family(case, folder)
    errors = measure_family(case, folder, lengths=QUICK_LENGTHS if is_quick else LENGTHS)
    return {
        "position": case.position,
        "special": case.special,
        "stock": errors.stock,
        "oracle": max(errors.token_by_token, errors.in_chunks),
    }


def measure_own(name: str, folder: Path, *, is_quick: bool = False) -> dict[str, Any]:
    exported = own.export_case(name, folder, own.QUICK_LENGTHS if is_quick else own.LENGTHS)
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


def versions(*more: str) -> dict[str, str]:
    names = ("transformers", "torch", "onnxruntime", *more)
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
