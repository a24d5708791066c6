"""The cost of quantisation in perplexity: the demo model on its held-out text, setting by setting.

Every setting is exported and scored in onnxruntime on the same tokens as the unquantised export,
in chunks, as one stream; costs are ratios of perplexities with standard errors over tokens.

    python -m benchmarks.evaluation.quantization --out benchmarks/results/quantization.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lminf_export
from benchmarks.support.result import write_result
from lminf_export.quantize.config import QuantizeConfig
from lminf_export.runtime.environment import environment
from lminf_export.verify.perplexity_cost import perplexity_cost

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo-llama"
CALIBRATION = MODEL / "heldout-austen.txt"
# Before scales were searched: what onnxruntime's quantiser makes.
BEFORE = QuantizeConfig(
    "int4", symmetric=True, scales="range", block_size=32, mixed="off", lm_head="same"
)
SETTINGS: dict[str, QuantizeConfig] = {
    "int8": QuantizeConfig("int8"),
    "int4": QuantizeConfig("int4"),
    "int4, calibrated on another text": QuantizeConfig("int4"),
    "int4, activations not rounded": QuantizeConfig("int4", accuracy_level=1),
    "int4, symmetric": QuantizeConfig("int4", symmetric=True),
    "int4, not mixed": QuantizeConfig("int4", block_size=16, mixed="off"),
    "int4, blocks of 32": QuantizeConfig("int4", block_size=32),
    "int4, blocks of 128": QuantizeConfig("int4", block_size=128),
    "int4, lm_head as the others": QuantizeConfig("int4", lm_head="same"),
    "int4 as before scales were searched": BEFORE,
    "Q/DQ int4": QuantizeConfig("int4", form="qdq"),
    "Q/DQ int8": QuantizeConfig("int8", form="qdq"),
    "Q/DQ fp8": QuantizeConfig("fp8", form="qdq"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window-size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lminf-") as work:
        result = measure(Path(work), arguments.tokens, arguments.window_size)
    write_result(arguments.out, result)


def measure(work: Path, count: int, window: int) -> dict[str, Any]:
    full, full_bytes, tokens = score(work / "full", None, count, window)
    rows = []
    for name, config in SETTINGS.items():
        text = CALIBRATION if "calibrated" in name else None
        logits, size, _ = score(work / "quantised", config, count, window, text)
        cost = perplexity_cost(full, logits, tokens)
        rows.append(
            {
                "settings": name,
                "weights_bytes": size,
                "perplexity": cost.quantized,
                "cost": cost.cost,
                "standard_error": cost.standard_error,
            }
        )
        print(rows[-1], file=sys.stderr)
    return {
        "benchmark": "quantization",
        "model": MODEL.name,
        "window_size": window,
        "tokens": cost.tokens,
        "full_bytes": full_bytes,
        "perplexity": cost.unquantized,
        "rows": rows,
        **environment(),
    }


def score(
    out: Path, config: QuantizeConfig | None, count: int, window: int, calibrate: Path | None = None
) -> tuple[Any, int, Any]:
    """Export, and return logits (T, V) on the held-out text, bytes of weights, and its tokens."""
    bundle = lminf_export.export(
        MODEL, out, quantize=config, calibrate=calibrate, window_size=window, force=True
    )
    model = lminf_export.load(bundle.path)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    tokens = np.asarray(model.codec.encode(text)[:count], np.int64)
    logits = model.forward(tokens[None], model.new_state())
    assert logits is not None
    sizes = [bundle.manifest.files[name].bytes for name in bundle.manifest.files_of("weights")]
    return logits[0], sum(sizes), tokens


if __name__ == "__main__":
    main()
