"""Every form in which exporters write attention is rewritten to what it computes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lminf_export
from lminf_export.rewriting.run import rewrite
from tests.support.foreign_attention import group_query, multi_head, packed_weights, standard
from tests.support.foreign_decoders import VOCABULARY, Attend, Graph, Original, Spec, decoder, truth
from tests.support.foreign_plain import Plain

WINDOW, SINKS, CHUNK = 23, 3, 7
# Largest error of a logit, relative to their range: rounding of float32.
CLOSE = 2e-5
IDS = np.random.default_rng(3).integers(0, VOCABULARY, 61)
PLAIN = Spec()
ALL_HEADS = Spec(kv_heads=4)


@cache
def wanted_of(spec: Spec) -> np.ndarray:
    return truth(spec, IDS, window=WINDOW, sinks=SINKS)


def require_right(
    folder: Path,
    spec: Spec,
    attend: Attend,
    *,
    runs: bool = True,
    slots: int | None = None,
    **graph: Any,
) -> None:
    """Rewrite a decoder; compare it with the original inside the window and with the truth."""
    written = Graph(spec, **graph)
    decoder(written, attend)
    model = folder / "model.onnx"
    onnx.save(written.model(), model)
    if runs:
        original = Original(model, slots)
        inside = np.concatenate(
            [original.step(IDS[:13]), *(original.step(x) for x in IDS[13:19, None])]
        )
    bundle = rewrite(
        model,
        folder / "out",
        window_size=WINDOW,
        num_sink_tokens=SINKS,
        chunk_size=CHUNK,
        check=False,
    )
    loaded = lminf_export.load(bundle.path)
    state = loaded.new_state()
    whole = loaded.forward(IDS[None], loaded.new_state())
    pieces = [loaded.forward(part[None], state) for part in np.split(IDS, [1, 6, 30])]
    wanted = wanted_of(spec)
    scale = CLOSE * np.ptp(wanted)
    if runs:
        np.testing.assert_allclose(inside, wanted[:19], rtol=0, atol=scale)
    np.testing.assert_allclose(whole[0], wanted, rtol=0, atol=scale)
    np.testing.assert_allclose(np.concatenate(pieces, 1)[0], wanted, rtol=0, atol=scale)


GROUPED = {
    "unpacked": (PLAIN, group_query()),
    "packed": (PLAIN, group_query(packed=True)),
    "two-layers": (replace(PLAIN, layers=2), group_query(packed=True)),
    "rotated-before": (PLAIN, group_query(rotary="before")),
    "not-rotated": (replace(PLAIN, rotary_dim=0), group_query()),
    "interleaved": (replace(PLAIN, interleaved=True), group_query()),
    "partly-rotated": (replace(PLAIN, dim=32), group_query()),
    "partly-rotated-before": (replace(PLAIN, rotary_dim=8), group_query(rotary="before")),
    "short-window": (replace(PLAIN, window=5), group_query()),
    "longer-window": (replace(PLAIN, window=37), group_query(packed=True)),
    "softcap": (replace(PLAIN, softcap=1.5), group_query()),
    "sinks": (replace(PLAIN, sinks="learned"), group_query()),
    "smooth": (replace(PLAIN, sinks="zero"), group_query()),
    "norms": (replace(PLAIN, qk_norm=True), group_query()),
    "norms-of-packed": (replace(PLAIN, qk_norm=True), group_query(packed=True)),
    "position-ids": (PLAIN, group_query(position_ids=True)),
    "alibi": (replace(PLAIN, rotary_dim=0, alibi=True), group_query()),
    "scale": (replace(PLAIN, scale=0.31), group_query()),
    "scale-of-0": (PLAIN, group_query(scale=0.0)),
    "lengths-as-inputs": (PLAIN, group_query(lengths="inputs")),
    "cache-of-a-window": (replace(PLAIN, window=5), group_query(sliding_window_cache=1)),
}


@pytest.mark.parametrize("form", GROUPED)
def test_group_query_attention(tmp_path: Path, form: str) -> None:
    spec, attend = GROUPED[form]
    # onnxruntime normalises queries and keys on other devices than a CPU only.
    runs = not spec.qk_norm and form != "cache-of-a-window"
    require_right(tmp_path, spec, attend, runs=runs)


def test_tokens_of_int32(tmp_path: Path) -> None:
    require_right(tmp_path, PLAIN, group_query(), ids=onnx.TensorProto.INT32)


UNROTATED = replace(ALL_HEADS, rotary_dim=0)
HEADS = {
    "separate": (ALL_HEADS, multi_head()),
    "bias": (replace(UNROTATED, bias=True), multi_head()),
    "packed-keys-values": (UNROTATED, multi_head(form="packed_kv")),
    "packed": (UNROTATED, multi_head(form="packed")),
    "alibi": (replace(UNROTATED, alibi=True), multi_head()),
    "window": (replace(ALL_HEADS, window=5), multi_head()),
    "unidirectional": (ALL_HEADS, multi_head(mask="none")),
    "padding": (ALL_HEADS, multi_head(mask="padding")),
    "scale": (replace(ALL_HEADS, scale=0.31), multi_head()),
    "past-outside": (ALL_HEADS, multi_head(past="outside")),
    "past-outside-flat": (ALL_HEADS, multi_head(past="outside", form="flat")),
    "interleaved": (replace(ALL_HEADS, interleaved=True), multi_head()),
}


@pytest.mark.parametrize("form", HEADS)
def test_multi_head_attention(tmp_path: Path, form: str) -> None:
    spec, attend = HEADS[form]
    # onnxruntime knows packed tensors on other devices than a CPU only.
    require_right(tmp_path, spec, attend, runs="packed" not in form)


WITH_WEIGHTS = {
    "plain": (UNROTATED, packed_weights()),
    "bias": (replace(UNROTATED, bias=True), packed_weights()),
    "scale": (replace(UNROTATED, scale=0.31), packed_weights()),
    "sizes": (UNROTATED, packed_weights(qkv_hidden_sizes=[64, 64, 64])),
}


@pytest.mark.parametrize("form", WITH_WEIGHTS)
def test_attention_that_holds_the_products(tmp_path: Path, form: str) -> None:
    spec, attend = WITH_WEIGHTS[form]
    require_right(tmp_path, spec, attend)


STANDARD = {
    "rank-3": (PLAIN, standard(), 23),
    "rank-4": (PLAIN, standard(rank=4), 23),
    "boolean-mask": (PLAIN, standard(mask="bool"), 23),
    "causal": (PLAIN, standard(mask="none"), 23),
    "causal-24": (PLAIN, standard(mask="none"), 24),
    "window-of-opset-25": (
        replace(PLAIN, window=5),
        standard(mask="none", left_window_size=4),
        25,
    ),
    "opset-25": (PLAIN, standard(mask="none"), 25),
    "softcap": (replace(PLAIN, softcap=1.5), standard(), 23),
    "scale": (replace(PLAIN, scale=0.31), standard(), 23),
    "window": (replace(PLAIN, window=5), standard(mask="bool"), 23),
    "alibi": (replace(PLAIN, rotary_dim=0), standard(), 23),
    "gathered-rows": (PLAIN, standard(rotary="gathered"), 23),
    "interleaved": (replace(PLAIN, interleaved=True), standard(), 23),
    "partly-rotated": (replace(PLAIN, rotary_dim=8), standard(), 23),
    "cache-by-concat": (PLAIN, standard(cache="concat"), 23),
    "cache-by-scatter": (PLAIN, standard(cache="scatter", mask="slots", slots="C"), 24),
    "fixed-cache": (PLAIN, standard(cache="scatter", mask="slots", slots=40), 24),
    "fixed-cache-causal": (PLAIN, standard(cache="scatter", mask="none", slots=40), 24),
}


@pytest.mark.parametrize("form", STANDARD)
def test_standard_attention(tmp_path: Path, form: str) -> None:
    spec, attend, opset = STANDARD[form]
    require_right(tmp_path, spec, attend, opset=opset, slots=40)


NORMED = replace(PLAIN, qk_norm=True)
UNTURNED = replace(PLAIN, rotary_dim=0)
ALIBI = replace(UNTURNED, alibi=True)
WRITTEN_OUT = {
    "as-it-is": (PLAIN, Plain()),
    "scaled-by-product": (PLAIN, Plain(scale="mul")),
    "scaled-queries": (PLAIN, Plain(scale="query")),
    "scaled-keys": (PLAIN, Plain(scale="key")),
    "scaled-both": (PLAIN, Plain(scale="both")),
    "another-scale": (replace(PLAIN, scale=0.31), Plain(scale="mul")),
    "mask-by-where": (PLAIN, Plain(mask="where")),
    "window": (replace(PLAIN, window=5), Plain()),
    "longer-window": (replace(PLAIN, window=37), Plain(mask="where")),
    "softcap": (replace(PLAIN, softcap=1.5), Plain()),
    "tile": (PLAIN, Plain(repeat="tile")),
    "gather": (PLAIN, Plain(repeat="gather")),
    "grouped": (PLAIN, Plain(repeat="grouped")),
    "grouped-unrotated": (UNTURNED, Plain(repeat="grouped")),
    "one-key-head": (replace(PLAIN, kv_heads=1), Plain()),
    "as-many-key-heads": (ALL_HEADS, Plain(repeat="none")),
    "einsum": (PLAIN, Plain(product="einsum")),
    "fused": (PLAIN, Plain(product="fused", scale="alpha")),
    "cache-by-scatter-nd": (PLAIN, Plain(cache="nd", mask="slots")),
    "slices": (PLAIN, Plain(rotate="slices")),
    "rotation-node": (PLAIN, Plain(rotate="node")),
    "interleaved": (replace(PLAIN, interleaved=True), Plain(rotate="interleaved")),
    "pairs": (replace(PLAIN, interleaved=True), Plain(rotate="complex")),
    "partly-rotated": (replace(PLAIN, rotary_dim=6), Plain(rotate="slices")),
    "few-pairs-interleaved": (
        replace(PLAIN, rotary_dim=6, interleaved=True),
        Plain(rotate="complex"),
    ),
    "frequencies": (PLAIN, Plain(angles="products")),
    "table-of-angles": (PLAIN, Plain(angles="gathered-angles")),
    "positions-by-sums": (PLAIN, Plain(positions="sums")),
    "positions-by-cache": (PLAIN, Plain(positions="cache")),
    "positions-by-mask": (PLAIN, Plain(positions="mask", angles="products")),
    "sinks": (replace(PLAIN, sinks="learned"), Plain()),
    "norms": (NORMED, Plain()),
    "alibi-table": (ALIBI, Plain(mask="slope-table")),
    "alibi-sums": (ALIBI, Plain(mask="slope-sums")),
    "alibi-and-window": (replace(ALIBI, window=37), Plain(mask="slope-table")),
    "tokens-first": (PLAIN, Plain(cache="tokens-first")),
    "biases": (replace(PLAIN, bias=True), Plain()),
}


def test_keys_written_into_slots_in_plain_operators(tmp_path: Path) -> None:
    require_right(tmp_path, PLAIN, Plain(cache="scatter", mask="slots"), opset=24)


@pytest.mark.parametrize("form", WRITTEN_OUT)
def test_attention_in_plain_operators(tmp_path: Path, form: str) -> None:
    spec, attend = WRITTEN_OUT[form]
    require_right(tmp_path, spec, attend)


HALVES = {
    "softmax-in-float32": (PLAIN, Plain(cast=True, angles="products")),
    "softmax-in-float16": (PLAIN, Plain()),
    "group-query": (PLAIN, group_query(packed=True)),
    "short-window": (replace(PLAIN, window=5), Plain(cast=True)),
    "sinks": (replace(PLAIN, sinks="learned"), Plain()),
}


@pytest.mark.parametrize("form", HALVES)
def test_graphs_of_float16(tmp_path: Path, form: str) -> None:
    spec, attend = HALVES[form]
    written = Graph(spec, dtype=np.float16)
    decoder(written, attend)
    onnx.save(written.model(), tmp_path / "model.onnx")
    bundle = rewrite(
        tmp_path / "model.onnx",
        tmp_path / "out",
        window_size=WINDOW,
        num_sink_tokens=SINKS,
        chunk_size=CHUNK,
    )
    loaded = lminf_export.load(bundle.path)
    found = loaded.forward(IDS[None], loaded.new_state())[0]
    wanted = wanted_of(spec)
    # Weights, and every number on the way, are rounded to 11 bits.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2**-8 * np.ptp(wanted))


CHECKED = {
    "group-query": (GROUPED["packed"], 23),
    "multi-head": (HEADS["alibi"], 23),
    "with-weights": (WITH_WEIGHTS["bias"], 23),
    "fixed-cache": (STANDARD["fixed-cache"][:2], 24),
    "opset-25": (STANDARD["opset-25"][:2], 25),
    "tokens-first": (WRITTEN_OUT["tokens-first"], 23),
    "norms": (GROUPED["norms"], 23),
    "packed": (HEADS["packed"], 23),
}


@pytest.mark.parametrize("form", CHECKED)
def test_check_against_the_original_passes(tmp_path: Path, form: str) -> None:
    (spec, attend), opset = CHECKED[form]
    graph = Graph(spec, opset=opset)
    decoder(graph, attend)
    onnx.save(graph.model(), tmp_path / "model.onnx")
    bundle = rewrite(tmp_path / "model.onnx", tmp_path / "out", window_size=WINDOW)
    compared = [n for n in bundle.manifest.notices if "does not run in onnxruntime" in n]
    assert len(compared) == int(form in ("norms", "packed"))
