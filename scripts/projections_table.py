"""Write the tables of projections in docs/cpu_kernel.md from benchmarks/results/."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cpu_kernel.md"
RESULTS = ("projections", "projections-int4")
NAMES = ("function_body", "attention_only", "kernel")


def table(result: dict, file: str) -> str:
    quantized = result.get("quantization")
    weights = result["dtype"] if quantized is None else f"{quantized['weights']} weights"
    product = "Gemm" if quantized is None else "MatMulNBits"
    titles = ("function bodies", f"kernel, {product}", "kernel")
    size, window = result["parameters_bytes"] / 1e6, result["lambda_config"]["window_size"]
    anew = ", the weights read anew before it" if result["weights_read_anew"] else ""
    lines = [
        f"{result['device']}, {result['threads']} thread(s), onnxruntime "
        f"{result['versions']['onnxruntime']}; a Llama of {size:.0f} MB in {weights}, "
        f"window {window}, taking turns in one run "
        f"([{file}](../benchmarks/results/{file})){anew}. In brackets: times "
        "the floor, which is a step's bytes over the best bandwidth measured between the turns.",
        "",
        "| decode, ms a token at | " + " | ".join(titles) + " | floor |",
        "|---|" + "---|" * (len(NAMES) + 1),
    ]
    for row in result["decode"]:
        cells = [f"{row[n]['ms_per_token']:.1f} ({row[n]['times_the_floor']:.2f})" for n in NAMES]
        lines.append(_row(f"{row['position']:,}", [*cells, f"{row['floor_ms']:.1f}"]))
    speeds = [f"{result['prefill_tokens_per_second'][n]:.0f}" for n in NAMES]
    lines.append(_row(f"prefill of {result['prefill_tokens']:,}, tokens a second", [*speeds, ""]))
    nodes = [str(sum(result["nodes_of_a_step"][n].values())) for n in NAMES]
    lines.append(_row("operators run in a step", [*nodes, ""]))
    memory = [result["memory"][n] for n in NAMES]
    anonymous = [f"{m['anonymous_over_imports_bytes'] / 2**20:.0f}" for m in memory]
    lines.append(_row("anonymous memory over the imports, MiB", [*anonymous, ""]))
    first = [f"{m['load_to_first_token_seconds']:.2f}" for m in memory]
    lines.append(_row("s from loading to the first token, after the imports", [*first, ""]))
    return "\n".join(lines) + "\n"


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in RESULTS:
        result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        head, rest = text.split(f"<!-- {name} -->\n")
        end = f"<!-- end of {name} -->\n"
        tail = rest.split(end)[1]
        new = table(result, f"{name}.json")
        text = f"{head}<!-- {name} -->\n\n{new}{end}{tail}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
