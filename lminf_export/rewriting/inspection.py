"""The facts of an ONNX model, and whether it can be rewritten: for `lminf inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from lminf_export.errors import LminfError, ModelError
from lminf_export.export.decisions import default_window
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import LambdaConfig
from lminf_export.progress import Progress, silent
from lminf_export.rewriting.assembling import assemble
from lminf_export.rewriting.detecting import find_onnx_model
from lminf_export.rewriting.finding import Finding, find_in_graph
from lminf_export.rewriting.job import training_length
from lminf_export.rewriting.opset import to_opset
from lminf_export.rewriting.planning import plan_layers
from lminf_export.rewriting.reading import following
from lminf_export.rewriting.rules import round_base
from lminf_export.rewriting.source import configured_plan, open_onnx
from lminf_export.rewriting.turning import Turning
from lminf_export.rewriting.whole_files import check_graph_file
from lminf_export.runtime.foreign_errors import foreign_errors

_ANY_WINDOW = 64
_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention", "Softmax")


@dataclass(frozen=True)
class LayerFacts:
    """The facts of one attention.

    Attributes:
        kind: the operator, or "MatMul, Softmax, MatMul".
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: dimensions of a head.
        scale: factor of the logits.
        softcap: 0 for none.
        window: keys that a query sees, None for all.
        rotary: "half-split", "interleaved" or "none".
        rotary_dim: dimensions that are rotated.
        theta: base of the frequencies, None where they follow no θ^(−2i/R).
        changes_at: tokens beyond which a text is rotated otherwise, None where it never is.
        alibi: whether it adds ALiBi's bias.
        sinks: whether learned logits join its softmax.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int | None
    rotary: str
    rotary_dim: int
    theta: float | None
    changes_at: int | None
    alibi: bool
    sinks: bool

    @classmethod
    def of(cls, finding: Finding) -> LayerFacts:
        """Gather them from a finding."""
        m = finding.measured
        style, dims, theta, switch = _rotation(m.turning)
        return cls(
            kind=finding.anchor.kind,
            heads=m.heads,
            kv_heads=m.kv_heads,
            head_dim=m.head_dim,
            scale=m.scale,
            softcap=m.softcap,
            window=m.window,
            rotary=style,
            rotary_dim=dims,
            theta=theta,
            changes_at=switch,
            alibi=m.alibi_slopes is not None,
            sinks=m.sink_logits is not None,
        )


def _rotation(turning: Turning | None) -> tuple[str, int, float | None, int | None]:
    if turning is None:
        return "none", 0, None, None
    ruled = round_base(turning)
    style = "interleaved" if turning.interleaved else "half-split"
    return style, turning.rotary_dim, ruled and ruled[0], turning.switch


@dataclass(frozen=True)
class OnnxFacts:
    """The facts of an ONNX model.

    Attributes:
        path: the graph's file.
        producer: the tool that wrote it, and its version.
        opset: of the standard operators.
        attention_operators: operator → number of its nodes, of those that attend or may.
        contrib_operators: operator → number of its nodes, of those that are no standard's.
        layers: what each attention computes; () where the graph is not understood.
        dtype: element type of the caches, None where the graph is not understood.
        vocab_size: V, None where the graph is not understood.
        window_size: the window that a rewrite would have by default, None where it is not known.
        problem: why it cannot be rewritten, None if it can.
        notices: what a rewrite would say.
    """

    path: str
    producer: str
    opset: int
    attention_operators: dict[str, int]
    contrib_operators: dict[str, int]
    layers: tuple[LayerFacts, ...] = ()
    dtype: str | None = None
    vocab_size: int | None = None
    window_size: int | None = None
    problem: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def can_be_rewritten(self) -> bool:
        """Whether `lminf-export --model` takes it."""
        return self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """Return the same as JSON can hold it."""
        return {**asdict(self), "can_be_rewritten": self.can_be_rewritten}


def inspect_onnx(model: str | Path, progress: Progress = silent) -> OnnxFacts:
    """Find out what an ONNX model is; write nothing.

    Args:
        model: the graph's file, or the folder that holds it.
        progress: receives the phase that runs.

    Raises:
        ModelError: it is no ONNX model.
    """
    path = find_onnx_model(model)
    if path is None:
        raise ModelError(f"{model} is no ONNX model; expected a file .onnx or a folder with one")
    facts = _read(path)
    try:
        with following(path):
            return _understood(facts, path, progress)
    except LminfError as error:
        return replace(facts, problem=str(error))


def _read(path: Path) -> OnnxFacts:
    """Return what a file says of itself."""
    check_graph_file(path)
    with foreign_errors(ModelError, f"{path} is not an ONNX model, or damaged"):
        proto = onnx.load(str(path), load_external_data=False)
        kinds = Counter(
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            for node in proto.graph.node
        )
        opsets = {entry.domain: entry.version for entry in proto.opset_import}
        return OnnxFacts(
            path=str(path),
            producer=f"{proto.producer_name} {proto.producer_version}".strip(),
            opset=opsets.get("", opsets.get("ai.onnx", 0)),
            attention_operators={n: c for n, c in kinds.items() if n.split("::")[-1] in _ATTENTION},
            contrib_operators={n: c for n, c in sorted(kinds.items()) if "::" in n},
        )


def _understood(facts: OnnxFacts, path: Path, progress: Progress) -> OnnxFacts:
    """Find out what a rewrite would, and whether its graph can be put together."""
    source = open_onnx(path, None)
    found = find_in_graph(source.path, source.head_dim, progress)
    trained = training_length(source, found)
    # What is in the graph does not depend on the window; any will do where none is known.
    asked = _ANY_WINDOW if trained is None else None
    window, notices = default_window(asked, trained)
    settings = LambdaConfig(window_size=window)
    facts = replace(
        facts,
        layers=tuple(LayerFacts.of(finding) for finding in found.layers),
        dtype=found.dtype,
        vocab_size=found.vocab_size,
        window_size=None if trained is None else window,
    )
    try:
        plan = plan_layers(found.layers, settings, configured_plan(source, settings, notices))
        contract = GraphContract(plan.attention.layers, found.dtype, None, found.vocab_size)
        assemble(found, plan, contract)
        to_opset(found.model)
    except LminfError as error:
        return replace(facts, problem=str(error))
    return replace(facts, notices=(*source.notices, *notices, *plan.attention.notices))
