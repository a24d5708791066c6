"""The words of `lminf inspect` about an ONNX model of another tool."""

from __future__ import annotations

from collections import Counter

import click

from lminf_export.cli.common import quiet_transformers
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.terminal import echo_json
from lminf_export.rewriting.inspection import LayerFacts, OnnxFacts, inspect_onnx


def show_onnx(model: str, *, as_json: bool) -> None:
    """Print what an ONNX model is, and whether it can be rewritten."""
    quiet_transformers()
    with progress_bar(quiet=as_json) as progress:
        facts = inspect_onnx(model, progress)
    if as_json:
        echo_json(facts.to_dict())
        return
    for name, value in _rows(facts):
        click.echo(f"{name:15} {value}")


def _rows(facts: OnnxFacts) -> list[tuple[str, str]]:
    rows = [
        ("graph", facts.path),
        ("written by", facts.producer or "a tool that does not name itself"),
        ("opset", str(facts.opset)),
        ("attention", _counts(facts.attention_operators) or "no operator of attention"),
        ("contributed", _counts(facts.contrib_operators) or "standard operators only"),
    ]
    if facts.dtype is not None:
        rows.append(("caches", f"{facts.dtype}, vocabulary of {facts.vocab_size}"))
    layers = Counter(_layer(layer) for layer in facts.layers)
    rows += [("layers", f"{count} × {words}") for words, count in layers.items()]
    if facts.window_size is not None:
        rows.append(("window", f"{facts.window_size} tokens by default"))
    rows += [("note", notice) for notice in facts.notices]
    verdict = "yes, by lminf-export --model" if facts.can_be_rewritten else f"no: {facts.problem}"
    return [*rows, ("can be rewritten", verdict)]


def _counts(operators: dict[str, int]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in operators.items())


def _layer(layer: LayerFacts) -> str:
    """Return one attention in words."""
    rotation = "no rotation"
    if layer.rotary != "none":
        base = f"θ = {layer.theta:g}" if layer.theta is not None else "scaled frequencies"
        rotation = f"{layer.rotary} rotation of {layer.rotary_dim} dimensions, {base}"
        if layer.changes_at is not None:
            rotation += f", others beyond {layer.changes_at} tokens"
    parts = [
        layer.kind,
        f"{layer.heads} query and {layer.kv_heads} key/value heads of {layer.head_dim}",
        rotation,
        "sees everything" if layer.window is None else f"window of {layer.window}",
        f"scale {layer.scale:.6g}",
        *([f"soft cap {layer.softcap:g}"] if layer.softcap else []),
        *(["ALiBi"] if layer.alibi else []),
        *(["learned sinks"] if layer.sinks else []),
    ]
    return ", ".join(parts)
