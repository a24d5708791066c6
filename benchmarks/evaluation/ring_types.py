"""Element types of rings on a pretrained model: perplexity and bytes of each, in onnxruntime.

A model is exported once for each type and reads a text as one stream in chunks. Rings of int8 are
those of `--kv-cache-dtype int8`, from whatever computes them. The other types are no option of an
export everywhere, so what they make of keys and values is written into the body of the operator,
in standard operators, before the ring of float32 takes them: a query meets what such a ring holds.

    python -m benchmarks.evaluation.ring_types --model /path/of/gemma-3-270m \\
        --out benchmarks/results/ring_types.json
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import lminf_export
from benchmarks.support.result import write_result
from lminf_export.operator import attention_body
from lminf_export.runtime.environment import environment
from lminf_export.runtime.language_model import LanguageModel

TEXT = Path(__file__).resolve().parents[2] / "examples" / "demo-llama" / "heldout-austen.txt"
FLOAT32, INT8 = "float32", "int8"
# TensorProto's numbers of element types.
_FLOAT, _BFLOAT16, _E4M3 = 1, 16, 17
_E4M3_LIMIT = 448.0
# Bytes of a scale for each row.
_SCALE_BYTES = 4


def _cast(source: str, target: str, to: int) -> tuple[str, ...]:
    return (
        f"{target}_narrow = Cast <to: int = {to}> ({source})",
        f"{target} = Cast <to: int = {_FLOAT}> ({target}_narrow)",
    )


def _scaled_e4m3(source: str, target: str) -> tuple[str, ...]:
    """A scale for each row, as rings of int8 have: the largest element becomes 448."""
    return (
        f"{target}_sizes = Abs ({source})",
        f"{target}_largest = ReduceMax <keepdims: int = 1> ({target}_sizes, axis_3)",
        f"{target}_scale = Div ({target}_largest, e4m3_limit)",
        f"{target}_is_zero = Equal ({target}_scale, unmasked)",
        f"{target}_divisor = Where ({target}_is_zero, one_32, {target}_scale)",
        f"{target}_steps = Div ({source}, {target}_divisor)",
        *_cast(f"{target}_steps", f"{target}_rounded", _E4M3),
        f"{target} = Mul ({target}_rounded, {target}_scale)",
    )


# Type → what becomes of a row in it, and the bytes of an element and of a row beside its elements.
ROUNDED = {
    "fp8 (E4M3) with a scale for each row": (_scaled_e4m3, 1, _SCALE_BYTES),
    "fp8 (E4M3) without scales": (lambda source, target: _cast(source, target, _E4M3), 1, 0),
    "bfloat16": (lambda source, target: _cast(source, target, _BFLOAT16), 2, 0),
}


@contextmanager
def rings_of(name: str) -> Iterator[None]:
    """Let exports of float32 round what their bodies write to rings."""
    if name not in ROUNDED:
        yield
        return
    rounding, *_ = ROUNDED[name]
    lines = (
        *attention_body._SLOTS,
        f"e4m3_limit = Constant <value_float: float = {_E4M3_LIMIT}> ()",
        "one_32 = Constant <value_float: float = 1.0> ()",
        *rounding("local_key", "ring_new_key"),
        *rounding("value", "ring_new_value"),
        attention_body._scatter("past_key", "ring_new_key"),
        attention_body._scatter("past_value", "ring_new_value"),
    )
    with mock.patch.dict(attention_body._WRITE, {False: lines}):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument("--window-size", type=int, default=1024)
    parser.add_argument("--num-sink-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--types", nargs="+", default=[FLOAT32, INT8, *ROUNDED])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    exact: np.ndarray | None = None
    for name in arguments.types:
        row, losses = measured(name, arguments)
        exact = losses if name == FLOAT32 else exact
        if exact is not None:
            row |= cost(losses, exact)
        print(row, file=sys.stderr)
        rows.append(row)
    result = {
        "benchmark": "ring_types",
        "model": arguments.model.name,
        "text": TEXT.name,
        "threads": arguments.threads,
        "rows": rows,
        **environment(),
    }
    write_result(arguments.out, result)


def measured(name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Return a type's row, and the loss of every token behind the first in nats."""
    with tempfile.TemporaryDirectory(prefix="lminf-") as work:
        with rings_of(name):
            bundle = lminf_export.export(
                arguments.model,
                Path(work) / "bundle",
                window_size=arguments.window_size,
                num_sink_tokens=arguments.num_sink_tokens,
                kv_cache_dtype=INT8 if name == INT8 else "auto",
                weights="link",
            )
        # A kernel would not see what the body rounds.
        kernels = "none" if name in ROUNDED else "auto"
        model = lminf_export.load(bundle.path, threads=arguments.threads, kernels=kernels)
        tokens = model.codec.encode(TEXT.read_text(encoding="utf-8"))[: arguments.tokens]
        losses = losses_of(model, np.asarray(tokens, np.int64))
        layers, manifest = bundle.manifest.contract.layers, bundle.manifest
        size = manifest.cache_bytes_per_sequence
        if name in ROUNDED:
            _, element, beside = ROUNDED[name]
            size -= sum(
                2 * x.num_kv_heads * x.ring_capacity * (x.head_dim * (4 - element) - beside)
                for x in layers
            )
        return {
            "rings": name,
            "tokens": len(losses),
            "lambda_config": manifest.lambda_config.model_dump(),
            "weights_sha256": [
                manifest.files[file].sha256 for file in manifest.files_of("weights")
            ],
            "attention": model.session.attention,
            "cache_bytes": size,
            "perplexity": perplexity(losses),
            "perplexity_behind_the_window": perplexity(losses[arguments.window_size :]),
        }, losses


def losses_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Return −log p (T − 1) of every token of one stream (T,) but the first, in float64."""
    state, losses = model.new_state(), []
    chunk = model.session.manifest.lambda_config.chunk_size
    for start in range(0, len(tokens) - 1, chunk):
        piece = tokens[start : min(start + chunk, len(tokens) - 1)]
        logits = model.forward(piece[None], state)
        assert logits is not None
        wide = logits[0].astype(np.float64)
        top = wide.max(axis=1, keepdims=True)
        totals = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
        wanted = tokens[start + 1 : start + 1 + len(piece)]
        losses.append(totals - wide[np.arange(len(piece)), wanted])
    return np.concatenate(losses)


def perplexity(losses: np.ndarray) -> float:
    return math.exp(losses.mean())


def cost(losses: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return a perplexity over that of float32 less 1, and its standard error by tokens."""
    difference = losses - exact
    ratio = math.exp(difference.mean())
    error = ratio * difference.std() / math.sqrt(len(difference))
    return {"cost": ratio - 1, "standard_error": float(error)}


if __name__ == "__main__":
    main()
