"""Tables about the step around a graph and the race on a real model, for docs/performance.md."""

from __future__ import annotations

from scripts.docs.tables import load, table


def drawing() -> str:
    """Milliseconds to draw a token, by kind of sampling and vocabulary."""
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
    head = ["ms a token", "σ of the logits", "V", "library", "library, B = 4", "numpy"]
    checks = ", ".join(f"{ms:.3f} ms (V = {int(v):,})" for v, ms in result["check_ms"].items())
    return (
        f"{table(head, rows)}\n\nThe check of a step that its logits are finite takes {checks}. "
        f"{result['device']}, one thread, {result['library']}, numpy {result['versions']['numpy']}."
    )
