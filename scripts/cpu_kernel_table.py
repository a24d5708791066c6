"""Write the tables of docs/cpu_kernel.md from benchmarks/results/cpu_kernel.json."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cpu_kernel.md"
NAMES = {
    "function_body": "function body",
    "kernel": "CPU kernel",
    "before": "before",
    "kernel_avx2": "CPU kernel, AVX2",
    "before_avx2": "before, AVX2",
    "kernel_portable": "CPU kernel, portable",
    "before_portable": "before, portable",
    "onnxruntime_genai": "onnxruntime-genai",
}


def tables(result: dict) -> str:
    names = [n for n in NAMES if n in result["prefill_tokens_per_second"]]
    size = result["parameters_bytes"] / 1e6
    lines = [
        f"{result['device']}, {result['threads']} thread(s), onnxruntime "
        f"{result['versions']['onnxruntime']}; a Llama of {size:.0f} MB in {result['dtype']}, "
        f"window {result['lambda_config']['window_size']}. Contestants take turns in one run "
        "([cpu_kernel.json](../benchmarks/results/cpu_kernel.json)). In brackets: times the "
        "kernel's time, the median of the rounds.",
        "",
        "| decode, ms a token at position | " + " | ".join(NAMES[n] for n in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row in result["decode"]:
        cells = [
            f"{row[n]['ms_per_token']:.1f} ({row[n]['times_the_kernels']:.2f})"
            if n in row
            else "not measured"
            for n in names
        ]
        lines.append(f"| {row['position']:,} | " + " | ".join(cells) + " |")
    speeds = [f"{result['prefill_tokens_per_second'][n]:.0f}" for n in names]
    lines.append(
        f"| prefill of {result['prefill_tokens']:,}, tokens a second | " + " | ".join(speeds) + " |"
    )
    nodes = {n: sum(kinds.values()) for n, kinds in result["nodes_of_a_step"].items()}
    counts = [str(nodes[n]) if n in nodes else "" for n in names]
    lines.append("| operators run in a step | " + " | ".join(counts) + " |")
    bandwidth = result["bandwidth_bytes_per_second"] / 1e9
    lines += ["", f"Memory streams at {bandwidth:.1f} GB/s in the same run."]
    return "\n".join(lines) + "\n"


def main() -> None:
    result = json.loads((ROOT / "benchmarks/results/cpu_kernel.json").read_text())
    text = PAGE.read_text(encoding="utf-8")
    head = text[: text.index("## Measured") + len("## Measured\n\n")]
    PAGE.write_text(head + tables(result), encoding="utf-8")


if __name__ == "__main__":
    main()
