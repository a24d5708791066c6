"""The tables of docs/rewriting.md, and the README's words about rewritten models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.docs.tables import MIB, load, table

_PEER, _BARE = "onnxruntime-genai int4", "onnxruntime-genai int4, its graph"


def speed() -> str:
    """How fast a rewritten int4 model decodes, over its original."""
    result = load("rewriting")
    shapes, versions = result["shapes"], result["versions"]
    rows = [
        [
            shape.upper(),
            threads,
            context,
            f"{peers['rewritten int4']['ms_per_token']:.1f}",
            _times(peers[_PEER]),
            _times(peers[_BARE]),
        ]
        for shape, found in shapes.items()
        for threads, runs in found["decoding"].items()
        for context, peers in runs["rows"].items()
    ]
    head = ["shape", "threads", "tokens before", "ms per token"]
    return (
        f"{table([*head, '× onnxruntime-genai', '× its graph in onnxruntime'], rows)}\n\n"
        f"{result['device']}, {result['cores']} cores; onnxruntime {versions['onnxruntime']}, "
        f"onnxruntime-genai {versions['onnxruntime-genai']}."
    )


def _times(peer: dict[str, Any]) -> str:
    found = peer["rewritten_is_faster"]
    low, high = found["quartiles"]
    return f"{found['median']:.2f} ({low:.2f} – {high:.2f})"


def cost() -> str:
    """Seconds and memory of a rewrite, its check included."""
    rows = []
    for shape, found in load("rewriting")["shapes"].items():
        run = found["rewriting"]
        rows.append(
            [
                shape.upper(),
                f"{run['model_bytes'] / MIB:,.0f} MiB",
                f"{run['seconds']:.1f} s",
                f"{run['peak_anonymous_over_imports_bytes'] / MIB:.0f} MiB",
            ]
        )
    return table(["shape", "model", "rewriting", "anonymous memory over the imports"], rows)


def beyond() -> str:
    """The end of the original, and how the rewritten model goes on."""
    found = load("rewriting")["beyond"]
    original, rewritten = found["original"], found["rewritten"]
    first, *_, last = rewritten["ms_per_token_by_quarter"]
    return (
        f"**Past its own end**: an int4 model of onnxruntime-genai's builder with a context of "
        f"{original['context_length']} stops there (`{original['at_max_length']}`). The same model "
        f"rewritten, with a window of {found['bundle']['lambda_config']['window_size']}, wrote "
        f"{rewritten['tokens']:,} tokens in the same run, {first:.1f} ms each in the first quarter "
        f"and {last:.1f} ms in the last."
    )


TABLES: dict[str, Callable[..., str]] = {
    "rewritten_speed": speed,
    "rewriting_cost": cost,
    "rewritten_beyond": beyond,
}
