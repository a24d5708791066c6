"""The tables of docs/quantization.md."""

from __future__ import annotations

from collections.abc import Callable

from scripts.docs.performance import where
from scripts.docs.tables import MIB, load, table


def real_int4() -> str:
    found = load("real/int4")
    rows = [
        [
            row["name"],
            f"{row['weights_bytes'] / MIB:.1f}",
            f"{row['perplexity']:.2f}",
            "–" if not row["cost"] else f"{row['cost']:+.1%} ± {row['standard_error']:.1%}",
        ]
        for row in found["rows"]
    ]
    return table(["weights", "MiB", "perplexity", "cost"], rows) + where(found)


TABLES: dict[str, Callable[..., str]] = {"real-int4": real_int4}
