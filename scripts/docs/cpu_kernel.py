"""The tables of docs/cpu_kernel.md: the attention kernel, and the projections beside onnxruntime's.

The column `before` of contestants is the library that `benchmarks/kernels/cpu_kernel.py --before`
was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.docs.tables import MIB, load, table

CONTESTANTS = {
    "function_body": "function body",
    "kernel": "CPU kernel",
    "before": "before",
    "kernel_avx2": "CPU kernel, AVX2",
    "before_avx2": "before, AVX2",
    "kernel_portable": "CPU kernel, portable",
    "before_portable": "before, portable",
    "onnxruntime_genai": "onnxruntime-genai",
}
FORMS = ("function_body", "attention_only", "kernel")


def contestants() -> str:
    """Decoding with the kernel, its body and others, with the times of the kernel in brackets."""
    result = load("cpu_kernel")
    names = [n for n in CONTESTANTS if n in result["prefill_tokens_per_second"]]
    rows = [
        [f"{row['position']:,}", *(_times(row.get(n), "times_the_kernels") for n in names)]
        for row in result["decode"]
    ]
    speeds = [f"{result['prefill_tokens_per_second'][n]:.0f}" for n in names]
    rows.append([f"prefill of {result['prefill_tokens']:,}, tokens a second", *speeds])
    nodes = {n: sum(kinds.values()) for n, kinds in result["nodes_of_a_step"].items()}
    rows.append(["operators run in a step", *(str(nodes.get(n, "")) for n in names)])
    head = ["decode, ms a token at position", *(CONTESTANTS[n] for n in names)]
    bandwidth = result["bandwidth_bytes_per_second"] / 1e9
    return (
        f"{_setting(result, result['dtype'])}. Contestants take turns in one run "
        f"({_file('cpu_kernel')}). In brackets: times the kernel's time, the median of the rounds."
        f"\n\n{table(head, rows)}\n\n"
        f"Memory streams at {bandwidth:.1f} GB/s in the same run."
    )


def projections(name: str) -> str:
    """Decoding with and without the kernels of projections, with times the floor in brackets."""
    result = load(name)
    quantized = result.get("quantization")
    weights = result["dtype"] if quantized is None else f"{quantized['weights']} weights"
    anew = ", the weights read anew before it" if result["weights_read_anew"] else ""
    return (
        f"{_setting(result, weights)}, taking turns in one run ({_file(name)}){anew}. In brackets: "
        "times the floor, which is a step's bytes over the best bandwidth measured between the "
        f"turns.\n\n{_projections_table(result, quantized is not None)}"
    )


def _projections_table(result: dict[str, Any], is_quantized: bool) -> str:
    product = "MatMulNBits" if is_quantized else "Gemm"
    rows = []
    for row in result["decode"]:
        cells = [_times(row[form], "times_the_floor") for form in FORMS]
        rows.append([f"{row['position']:,}", *cells, f"{row['floor_ms']:.1f}"])
    memory = [result["memory"][form] for form in FORMS]
    others = {
        f"prefill of {result['prefill_tokens']:,}, tokens a second": [
            f"{result['prefill_tokens_per_second'][form]:.0f}" for form in FORMS
        ],
        "operators run in a step": [
            str(sum(result["nodes_of_a_step"][form].values())) for form in FORMS
        ],
        "anonymous memory over the imports, MiB": [
            f"{m['anonymous_over_imports_bytes'] / MIB:.0f}" for m in memory
        ],
        "s from loading to the first token, after the imports": [
            f"{m['load_to_first_token_seconds']:.2f}" for m in memory
        ],
    }
    rows += [[title, *cells, ""] for title, cells in others.items()]
    head = ["decode, ms a token at", "function bodies", f"kernel, {product}", "kernel", "floor"]
    return table(head, rows)


def asking() -> str:
    """Decoding with weights asked for as data used once and like any other data."""
    result = load("asking")
    rows = [
        [
            f"{row['weight_bytes_per_step'] / MIB:.0f} MiB of {row['weights']}",
            str(row["threads"]),
            f"{row['ms_per_token']['once']:.1f}",
            f"{row['ms_per_token']['kept']:.1f}",
            f"{row['once_over_kept']['median']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ["weights of a step", "threads", "used once, ms a token", "like any other", "ratio"]
    return (
        f"{table(head, rows)}\n\n{result['device']}, {result['cores']} cores, onnxruntime "
        f"{result['versions']['onnxruntime']}; medians of turns in one process at position "
        f"{result['position']:,} ({_file('asking')})."
    )


def batches() -> str:
    """Streams that are decoded together, with what memory and arithmetic leave room for."""
    result = load("batch_decoding")
    rows = []
    for part, found in result["parts"].items():
        for row in found["rows"]:
            kernel, least, where = row["kernel"], row["arithmetic_ms"], row["profile_ms"]
            rows.append(
                [
                    part,
                    str(row["streams"]),
                    f"{kernel['ms_per_step']:.1f}",
                    f"{kernel['tokens_per_second']:.0f}",
                    f"{kernel['times_one_stream']:.2f}",
                    f"{row['bytes_ms']:.1f}",
                    "–" if least is None else f"{least:.2f}",
                    " / ".join(f"{where[name]:.1f}" for name in ("products", "attention", "rest")),
                ]
            )
    head = ["weights", "streams", "ms a step", "tokens/s", "times one stream", "bytes, ms"]
    head += ["products, ms", "profile: products / attention / rest, ms"]
    return (
        f"{table(head, rows)}\n\nMedians of steps at position "
        f"{result['position']:,}, batches taking turns; random weights of the shape "
        f"{result['shape']}; {result['device']}, {result['cores']} cores, onnxruntime "
        f"{result['versions']['onnxruntime']} ({_file('batch_decoding')})."
    )


def _times(cell: dict[str, float] | None, of: str) -> str:
    return "not measured" if cell is None else f"{cell['ms_per_token']:.1f} ({cell[of]:.2f})"


def _setting(result: dict[str, Any], weights: str) -> str:
    size = result["parameters_bytes"] / 1e6
    return (
        f"{result['device']}, {result['threads']} thread(s), onnxruntime "
        f"{result['versions']['onnxruntime']}; a Llama of {size:.0f} MB in {weights}, "
        f"window {result['lambda_config']['window_size']}"
    )


def _file(name: str) -> str:
    return f"[{name}.json](../benchmarks/results/{name}.json)"


TABLES: dict[str, Callable[..., str]] = {
    "contestants": contestants,
    "projections": projections,
    "asking": asking,
    "batches": batches,
}
