"""A Llama in, a bundle out: every rotary scaling, past many windows, against two references."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import pytest
import torch
from transformers import AutoModelForCausalLM

from lminf_export import export, load
from lminf_export.checkpoint.source import open_source
from lminf_export.models.registry import find_family
from tests.support.llama_oracle import lambda_llama_logits
from tests.support.tiny_models import ROPE_SCALINGS, llama_config, save_llama

WINDOW, SINKS, CHUNK = 23, 5, 7
TOLERANCE = 2e-5  # of the logits' range: the contract for float32


def oracle(folder, tokens, window=WINDOW, sinks=SINKS, limit=None):
    source = open_source(folder)
    settings = export_settings(window, sinks, limit)
    rotation = find_family("llama").plan(source.config, settings).rotations[0]
    return lambda_llama_logits(
        folder,
        source.config,
        rotation.inv_freq,
        rotation.attention_factor,
        torch.from_numpy(tokens),
        window=window,
        sinks=sinks,
        limit=limit or window,
    ).numpy()


def export_settings(window, sinks, limit):
    from lminf_export import LambdaConfig

    return LambdaConfig(window, sinks, limit, CHUNK)


def random_tokens(count, seed=0, vocab=131):
    return np.random.default_rng(seed).integers(0, vocab, count)


def relative_error(got, wanted):
    return np.abs(got - wanted).max() / (wanted.max() - wanted.min())


def stream(model, tokens, sizes):
    state, start, out = model.new_state(), 0, []
    for size in sizes:
        piece = tokens[None, start : start + size]
        if piece.size:
            out.append(model.forward(piece, state)[0])
        start += size
    assert int(state.past_length[0]) == len(tokens)
    return np.concatenate(out)


@pytest.mark.sampled
@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_logits_equal_the_oracle_over_twelve_windows(scaling, tmp_path):
    folder = save_llama(tmp_path / "m", rope_parameters=ROPE_SCALINGS[scaling])
    export(folder, tmp_path / "b", window_size=WINDOW, num_sink_tokens=SINKS, chunk_size=CHUNK)
    tokens = random_tokens(12 * WINDOW + 1)
    wanted = oracle(folder, tokens)
    model = load(tmp_path / "b")
    sizes = [1] * len(tokens)
    assert relative_error(stream(model, tokens, sizes), wanted) < TOLERANCE
    uneven = [3, 1, 7, 2, 19, 5, 1, 41] * len(tokens)
    assert relative_error(stream(model, tokens, uneven), wanted) < TOLERANCE


@pytest.mark.sampled
@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_logits_equal_stock_transformers_inside_the_window(scaling, tmp_path):
    folder = save_llama(tmp_path / "m", rope_parameters=ROPE_SCALINGS[scaling])
    export(folder, tmp_path / "b", window_size=200, chunk_size=64)
    tokens = random_tokens(200)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens[None])).logits[0].numpy()
    model = load(tmp_path / "b")
    got = model.forward(tokens[None], model.new_state())[0]
    assert relative_error(got, wanted) < TOLERANCE


@pytest.mark.sampled
@pytest.mark.parametrize(
    "settings",
    [
        {"num_sink_tokens": 0},
        {"num_sink_tokens": 31},
        {"window_size": 1, "num_sink_tokens": 2},
        {"window_size": 5, "chunk_size": 11},
        {"chunk_size": 1},
        {"distance_limit": 40},
    ],
    ids=str,
)
def test_settings_reach_the_graph(settings, tmp_path):
    chosen = {"window_size": WINDOW, "num_sink_tokens": SINKS, "chunk_size": CHUNK, **settings}
    folder = save_llama(tmp_path / "m")
    export(folder, tmp_path / "b", **chosen)
    tokens = random_tokens(6 * WINDOW)
    wanted = oracle(
        folder,
        tokens,
        chosen["window_size"],
        chosen["num_sink_tokens"],
        chosen.get("distance_limit"),
    )
    got = stream(load(tmp_path / "b"), tokens, [2, 13, 1, 1, 5] * len(tokens))
    assert relative_error(got, wanted) < TOLERANCE


@pytest.mark.sampled
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"shard": "60KB"},
        {"dtype": torch.bfloat16},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_every_kind_of_checkpoint_exports(changes, tmp_path):
    folder = save_llama(tmp_path / "m", **changes)
    if "shard" in changes:
        assert len(list(folder.glob("*.safetensors"))) > 2
    export(folder, tmp_path / "b", window_size=WINDOW, num_sink_tokens=SINKS, chunk_size=CHUNK)
    tokens = random_tokens(5 * WINDOW)
    got = stream(load(tmp_path / "b"), tokens, [4, 1, 9] * len(tokens))
    assert relative_error(got, oracle(folder, tokens)) < TOLERANCE


def test_rows_of_different_lengths_equal_rows_alone(tmp_path):
    folder = save_llama(tmp_path / "m")
    export(folder, tmp_path / "b", window_size=WINDOW, num_sink_tokens=SINKS, chunk_size=CHUNK)
    model = load(tmp_path / "b")
    rng = np.random.default_rng(3)
    texts = [random_tokens(9 * WINDOW, seed) for seed in (1, 2, 3)]
    wanted = [oracle(folder, text) for text in texts]
    state = model.new_state(3)
    while (state.past_length < 7 * WINDOW).all():
        before = state.past_length
        lengths = rng.integers(0, 16, 3)
        width = max(1, int(lengths.max()))
        ids = rng.integers(0, 131, (3, width))
        for row in range(3):
            ids[row, : lengths[row]] = texts[row][before[row] : before[row] + lengths[row]]
        logits = model.forward(ids, state, lengths=lengths)
        assert (state.past_length == before + lengths).all()
        for row in range(3):
            got = logits[row, : lengths[row]]
            right = wanted[row][before[row] : before[row] + lengths[row]]
            if lengths[row]:
                assert np.abs(got - right).max() < TOLERANCE * np.ptp(wanted[row])


@pytest.mark.slow
def test_float16_errs_at_most_twice_as_much_as_torch_in_float16(tmp_path):
    from lminf_export.models.base import build_model
    from lminf_export.models.history import HistoryStep
    from lminf_export.models.steps import run

    folder = save_llama(tmp_path / "m")
    export(
        folder,
        tmp_path / "b",
        window_size=WINDOW,
        num_sink_tokens=SINKS,
        chunk_size=CHUNK,
        dtype="float16",
    )
    tokens = random_tokens(10 * WINDOW)
    wanted = oracle(folder, tokens)
    got = stream(load(tmp_path / "b"), tokens, [1] * len(tokens))
    source, family = open_source(folder), find_family("llama")
    model = build_model(source.config, torch.float16, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.load_state_dict(stock.state_dict())
    step = HistoryStep(family.plan(source.config, export_settings(WINDOW, SINKS, None)))
    step.begin(torch.tensor([len(tokens)]))
    rows = torch.arange(len(tokens))[None]
    with torch.no_grad(), family.patched(model):
        in_torch = run(model, torch.from_numpy(tokens[None]), step, rows)[0].double().numpy()
    assert relative_error(got, wanted) <= 2 * relative_error(in_torch, wanted)


@pytest.mark.slow
def test_bfloat16_layers_without_sink_tokens_export(tmp_path):
    source = save_llama(tmp_path / "m")
    bundle = export(source, tmp_path / "b", dtype="bfloat16", window_size=11, num_sink_tokens=0)
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    (no_sinks,) = [x for x in graph.initializer if "no_sinks" in x.name]
    assert no_sinks.data_type == onnx.TensorProto.BFLOAT16
    assert not np.asarray(onnx.numpy_helper.to_array(no_sinks), np.float32).any()


@pytest.mark.slow
def test_bundle_repeats_the_essentials_in_the_graph(tmp_path):
    folder = save_llama(tmp_path / "m")
    bundle = export(folder, tmp_path / "b", window_size=WINDOW, chunk_size=CHUNK)
    model = onnx.load(str(bundle.graph_path), load_external_data=False)
    props = {p.key: p.value for p in model.metadata_props}
    assert props["lminf.window_size"] == str(WINDOW)
    assert props["lminf.model_type"] == "llama"
    assert {f.name for f in model.functions} == {"LambdaAttention", "Linear", "LinearAdd"}
    nodes = [n for n in model.graph.node if n.op_type == "LambdaAttention"]
    assert len(nodes) == llama_config().num_hidden_layers
    assert {o.domain: o.version for o in model.opset_import} == {"": 24, "lminf": 1}
    manifest = json.loads((tmp_path / "b" / "lminf.json").read_text())
    assert manifest["lambda_config"]["distance_limit"] == WINDOW
    assert manifest["source"]["name"] == "m"
    assert str(tmp_path) not in (tmp_path / "b" / "lminf.json").read_text()


def test_past_caches_are_read_by_nothing_but_the_write(tmp_path):
    folder = save_llama(tmp_path / "m")
    bundle = export(folder, tmp_path / "b", window_size=WINDOW, chunk_size=CHUNK)
    model = onnx.inliner.inline_local_functions(
        onnx.load(str(bundle.graph_path), load_external_data=False)
    )
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            if name.startswith("past_key_values.") and "sink" not in name:
                readers.setdefault(name, []).append(node.op_type)
    assert len(readers) == 2 * llama_config().num_hidden_layers
    shapes = [name for name, ops in readers.items() if "Shape" in ops]
    assert len(shapes) <= 1, "the ring's size is read once, from one ring"
    assert all(set(ops) <= {"TensorScatter", "Shape"} for ops in readers.values())


@pytest.mark.slow
def test_no_logits_are_computed_where_nobody_reads_them(tmp_path):
    folder = save_llama(tmp_path / "m")
    export(folder, tmp_path / "b", window_size=WINDOW, num_sink_tokens=SINKS, chunk_size=CHUNK)
    model = load(tmp_path / "b")
    tokens = random_tokens(4 * WINDOW)
    wanted = oracle(folder, tokens)
    state = model.new_state()
    assert model.forward(tokens[None, :-1], state, logits="none") is None
    last = model.forward(tokens[None, -1:], state, logits="last")
    assert last.shape == (1, 1, 131)
    assert last.dtype == np.float32
    assert np.abs(last[0, 0] - wanted[-1]).max() < TOLERANCE * np.ptp(wanted)
