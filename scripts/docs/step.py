"""Tables about the step around a graph and the race on a real model, for docs/performance.md."""

from __future__ import annotations

from scripts.docs.tables import load, table


def drawing() -> str:
    """Milliseconds to draw a token, the best of many draws, by kind of sampling and vocabulary."""
    result = load("drawing")
    rows = [
        [
            row["kind"],
            f"{row['logits_standard_deviation']:g}",
            f"{row['vocab_size']:,}",
            *(f"{row['library'][batch]['median']:.3f}" for batch in ("1", "4")),
            f"{row['numpy']['1']['median']:.2f}",
        ]
        for row in result["ms_a_token_by_batch_size"]
    ]
    head = ["ms a token, the best", "σ of the logits", "V", "library", "library, B = 4", "numpy"]
    checks = ", ".join(f"{ms:.3f} ms (V = {int(v):,})" for v, ms in result["check_ms"].items())
    return (
        f"{table(head, rows)}\n\nThe check of a step that its logits are finite takes {checks}. "
        f"{result['device']}, one thread, {result['library']}, numpy {result['versions']['numpy']}."
    )


def gguf_race() -> str:
    """Prefill and decoding of a GGUF file's model beside llama.cpp."""
    result = load("gguf_race")
    rows, notes = [], []
    for threads, groups in result["threads"].items():
        for found in groups.values():
            for name, row in found["prefill"]["rows"].items():
                cells = found["decode"]["rows"].get(name, {})
                times = {c: cell.get("ms_per_token") for c, cell in cells.items()}
                shares = found["decode"].get("share_of_streaming_bandwidth", {})
                shares = shares if name.startswith("ours") else {}
                rows.append([name, threads, _number(row.get("tokens_per_second"), ".0f")])
                for context, ms in times.items():
                    share = f" ({shares[context]:.2f})" if context in shares else ""
                    rows[-1].append(_number(ms, ".1f") + share)
            if ratio := found["prefill"].get("ours_against_llama_cpp"):
                names = " against ".join(reversed(list(found["prefill"]["rows"])))
                notes.append(f"{names}, {threads} thread(s): {ratio:.2f}")
    contexts = list(next(iter(found["decode"]["rows"].values())))
    head = ["", "threads", f"prefill of {found['prefill']['tokens']:,}, tokens/s"]
    head += [f"decode, ms a token at {int(context):,}" for context in contexts]
    return (
        f"{table(head, rows)}\n\nPrefill, median of the turns' ratios: {'; '.join(notes)}. "
        f"{result['model']}; {result['device']}, {result['cores']} cores."
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
