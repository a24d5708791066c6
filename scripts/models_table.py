"""The table of supported models: measured, kept as JSON, written as docs/models.md.

`models_table.py` writes the page from the last results; `models_table.py measure [NAME …]`
repeats the checks of the tests first, for all families or some; with `--engine` it also tries to
build a TensorRT-RTX engine of each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT))

from benchmarks.support import own_families as own  # noqa: E402
from benchmarks.support.families import CASES, FamilyCase  # noqa: E402
from benchmarks.support.family_check import check_family, stock_error  # noqa: E402
from lminf_export import LminfError, export  # noqa: E402

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
HEAD = """# Models

Every row is a small random model of its family with what is special about it switched on, exported
to ONNX and run in onnxruntime in float32. *Inside the window* is the largest difference of a logit
from transformers' own model for texts of up to the window's length; *after five windows* the
largest difference from an independent float64 computation over the whole text (an explicit table
of distances, no cache), for two texts of different lengths decoded together, token by token and
in irregular chunks. Both are relative to the range of the logits; 2e-5 is the limit. The engine
is TensorRT for RTX in float16, built on a CPU and not run.

This page is written by `scripts/models_table.py` from `benchmarks/results/models.json`.

| model | positions | what is special | inside the window | after five windows | ONNX | engine |
|---|---|---|---|---|---|---|
"""
TAIL = """
## Other models

A `model_type` that is not in the table is probed when it is exported: a small random instance of
the configuration runs, and the export goes on, with a notice, if

1. every layer attends exactly once,
2. queries, keys and values do not change with the absolute position, near the start or far from
   it, once the rotation is taken out,
3. tokens reach one another by attention only,
4. putting the rotation back gives the original's queries and keys, and
5. the logits inside the window are the original's.

Where one fails, the error says which and why the text after the window would be wrong. Known to
fail: `gpt2`, `opt`, `biogpt`, `gpt_bigcode` (learned positions); `ministral3` (queries are scaled
by the absolute position); `llama4_text`, `deepseek_v2` (a rotation of their own); `deepseek_v3`
(keys and values that are projected from one latent, of different sizes); `doge`, `xglm` (masks and
positions of their own); `diffllama` (two attentions a layer); `qwen3_next`, `lfm2`, `minimax`,
`olmo_hybrid`, `recurrent_gemma`, `falcon_h1`, `jamba`, `mamba` (recurrent or convolutional state).

The norms of `hunyuan_v1_dense` and `hunyuan_v1_moe` stand *after* the rotation, with a weight for
each dimension. A norm whose weights are equal within each rotated pair may change places with the
rotation, and such a checkpoint exports exactly. One whose weights differ within a pair has logits
that depend on p + j, not on p − j alone: nothing that knows distances only can compute them, and
the export, which looks at the tensors, refuses it.

## Checkpoints

A checkpoint is read in the hub's own tensor names, experts one by one or stacked. Quantised ones
are decoded tensor by tensor while the bundle is written, and take the room of `--dtype` there;
activations are never quantised, which a model quantised with them may feel in its last digits.

| `quant_method` | what is read |
|---|---|
| `mxfp4` | experts as gpt-oss ships them |
| `fp8`, `fbgemm_fp8` | FP8 with one scale, one for each row, or a grid of them |
| `compressed-tensors` | `float-quantized`, `int-quantized`, `naive-quantized`, `pack-quantized` |
| `gptq` | 2, 4 and 8 bits, act-order, both versions of the zeros |
| `awq` | 4 bits in the gemm layout |
| `bitnet` | packed ternary weights, and master weights rounded at each use |

All others (bitsandbytes, EETQ, HQQ, AQLM, …) are refused in one line. `.bin` files are read with
`--allow-pickle` only, and nothing but tensors is unpickled from them.

`--lora DIR` merges a LoRA adapter of PEFT, by the same rules as its own `merge_and_unload`: ranks
and factors by pattern, rank-stabilised, DoRA, embeddings, biases, saved modules, and parameters of
experts. An adapter that changes one of two tied tensors unties them. What cannot become plain
weights (another PEFT method, a starting point that changed the base, trained token rows) is
refused. `lminf validate BUNDLE --model M --lora DIR` compares every weight of a merged bundle with
the two it was made from.

## Mixtures of experts in low precision

Where two experts nearly tie, float16 may take another one than float64, and the logits then differ
by far more than rounding. `lminf validate` therefore sends the reference to the experts that the
bundle chose, compares logits under that one routing, and reports how many choices are not the
reference's own. Each of those must have been a near-tie: within four times the largest error that
torch makes in the router's scores in the bundle's precision.

## Layers with a window of their own

Layers trained with a sliding window keep it, in a ring of that size and without sink tokens; Λ is
for the layers that see everything. `--lambda-layers all` gives sinks to the sliding layers too,
within their own window. A configuration with `sliding_window` and no `layer_types`
(Mistral-7B-v0.1, Phi-3-mini-4k) slides everywhere: no layer is left for Λ, and the export says so.
A window as long as the longest text the model is made for (Phi-3-mini-128k) is none.

## Rotary scalings

`default`, `linear`, `llama3` and `yarn` are static. `dynamic` (NTK) and `longrope` change with the
length of a text, which a stream does not have; they are frozen at export. `--rope-regime short`
takes the frequencies of texts within the original length, `long` those of longer ones (`dynamic`:
of texts `factor` times as long); without it the window decides. In the short regime the export
equals transformers inside the window; in the long one it need not.

## Where transformers and the original differ

We follow what transformers computes with its `sdpa` attention.

- Falcon with ALiBi: transformers' `eager` attention adds the bias twice, and its slopes are
  rounded to bfloat16; ours are not, so the two agree for short texts only.
- MPT: `alibi_bias_max` and `alibi: false` are ignored by transformers, and so here, with a notice.
- `mistral` with `layer_types` in its configuration is read as `ministral`.
- Qwen2: a layer slides if `use_sliding_window` is set and its index is at least
  `max_window_layers`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", choices=["measure"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--engine", action="store_true", help="build TensorRT-RTX engines too")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    if options.command == "measure":
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
    PAGE.write_text(page(results))


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


def page(results: dict[str, Any]) -> str:
    rows = sorted(results["rows"].items())
    lines = [
        f"| `{name}` | {row['position']} | {row['special']} | {row['stock']:.1e} | "
        f"{row['oracle']:.1e} | yes | {row.get('engine', 'not tried')} |\n"
        for name, row in rows
    ]
    made_with = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{HEAD}{''.join(lines)}\n{len(rows)} rows, measured with {made_with}.\n{TAIL}"


if __name__ == "__main__":
    main()
