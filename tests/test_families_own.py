"""Families without the attention interface: inside the window as stock, and many windows on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from benchmarks.support.own_families import (
    CASES,
    CHUNK,
    LIMIT,
    SINKS,
    TOLERANCE,
    TRAINED,
    VOCAB,
    WINDOW,
    Exported,
    decode,
    error,
    export_case,
    make_config,
    save,
)
from benchmarks.support.own_oracle import paper_slopes
from lminf_export import LambdaConfig, export, load
from lminf_export.errors import ConfigError, ModelError
from lminf_export.models.alibi import alibi_slopes
from lminf_export.models.registry import find_family


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory) -> Exported:
    """One export of each family, two texts and what Λ-attention makes of them."""
    return export_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.sampled
def test_two_texts_token_by_token_equal_the_oracle_after_five_windows(exported):
    # The first step gives the second text a lead, so the rows never stand at one position.
    steps = iter([np.array([1, 4])])
    got = decode(exported, lambda remaining: next(steps, np.array([1, 1])))
    for logits, wanted in zip(got, exported.wanted, strict=True):
        assert error(logits, wanted) < TOLERANCE


@pytest.mark.sampled
def test_two_texts_in_irregular_chunks_equal_the_oracle_after_five_windows(exported):
    rng = np.random.default_rng(3)
    got = decode(exported, lambda remaining: rng.integers(0, 3 * CHUNK, 2))
    for logits, wanted in zip(got, exported.wanted, strict=True):
        assert error(logits, wanted) < TOLERANCE


@pytest.mark.sampled
def test_logits_equal_stock_transformers_inside_the_window(exported):
    stock = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32)
    text = exported.texts[0][None, :WINDOW]
    with torch.no_grad():
        wanted = stock(torch.from_numpy(text)).logits[0].numpy()
    got = exported.model.forward(text, exported.model.new_state())[0]
    assert error(got, wanted) < TOLERANCE


@pytest.mark.sampled
def test_the_graph_has_one_attention_a_layer_and_neither_mask_nor_bias_of_the_model(exported):
    graph = onnx.load(str(exported.graph), load_external_data=False).graph
    config = AutoConfig.from_pretrained(exported.folder)
    nodes = [node.op_type for node in graph.node]
    assert nodes.count("LambdaAttention") == config.num_hidden_layers
    assert not {"Softmax", "CumSum", "Trilu", "Sin", "Cos", "ScatterND"} & set(nodes)
    # Every table a model would look its positions or biases up in has their number as a size.
    sizes = {size for tensor in graph.initializer for size in tensor.dims}
    assert TRAINED not in sizes


def plan_of(name: str, **changes: Any) -> Any:
    config = make_config(name, **changes)
    return find_family(config.model_type).plan(config, LambdaConfig(WINDOW, SINKS, LIMIT, CHUNK))


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 8, 12, 16, 31, 32, 71, 112])
def test_slopes_are_those_of_the_paper_and_of_stock_transformers(heads):
    two = torch.ones(1, 2, dtype=torch.int64)
    slopes = alibi_slopes(heads)
    for wanted in (
        paper_slopes(heads),
        build_alibi_tensor(two, heads, torch.float32)[:, 0, 1].double(),
        -build_mpt_alibi_tensor(heads, 2)[:, 0, 0].double(),
    ):
        torch.testing.assert_close(slopes.double(), wanted, rtol=1e-6, atol=0)


def test_falcon_scales_its_slopes_and_does_not_round_them():
    slopes = plan_of("falcon-rw", hidden_size=72, num_attention_heads=12).alibi_slopes
    torch.testing.assert_close(slopes.double(), paper_slopes(12) / 6**0.5, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_falcon_with_alibi_equals_stock_up_to_256_tokens(tmp_path):
    """Six heads have slopes that bfloat16 holds, and it holds products with positions to 256."""
    folder = save("falcon-rw", tmp_path / "m")
    export(folder, tmp_path / "b", window_size=256, chunk_size=64)
    text = np.random.default_rng(1).integers(0, VOCAB, (1, 256))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = stock(torch.from_numpy(text)).logits[0].numpy()
    model = load(tmp_path / "b", threads=1)
    assert error(model.forward(text, model.new_state())[0], wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "groups"), [("falcon-7b", 1), ("falcon-40b", 2), ("falcon-rw", 6), ("bloom", 12)]
)
def test_caches_hold_a_key_for_each_group_of_heads_only(name, groups):
    assert {layer.num_kv_heads for layer in plan_of(name).layers} == {groups}


def test_settings_of_mpt_that_transformers_ignores_are_told_to_the_user():
    assert plan_of("mpt").notices == ()
    (notice,) = plan_of("mpt", attn_config={"alibi": False, "alibi_bias_max": 16}).notices
    assert "alibi: false, alibi_bias_max: 16" in notice


def test_bloom_asks_for_a_window(tmp_path):
    folder = save("bloom", tmp_path / "m", n_layer=1)
    with pytest.raises(ConfigError, match="--window-size"):
        export(folder, tmp_path / "b")


def test_other_families_know_their_training_length():
    for name in CASES.keys() - {"bloom"}:
        config = make_config(name)
        assert find_family(config.model_type).training_length(config) == TRAINED


def test_bloom_is_refused_where_transformers_leaves_biases_out():
    with pytest.raises(ModelError, match="slow_but_exact"):
        plan_of("bloom", slow_but_exact=True, pretraining_tp=2)


def test_a_rotation_that_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="rotary_dim=64"):
        plan_of("gptj", rotary_dim=64)
    with pytest.raises(ModelError, match="rotary_dim=5"):
        plan_of("codegen", rotary_dim=5)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="'dynamic'"):
        plan_of("falcon-7b", rope_parameters=rope)


@pytest.mark.parametrize("name", ["gptj", "mpt", "bloom", "falcon-7b"])
def test_a_rope_regime_is_refused_where_there_is_none(name):
    config = make_config(name)
    with pytest.raises(ConfigError, match="rope_regime=short"):
        find_family(config.model_type).plan(config, LambdaConfig(WINDOW, rope_regime="short"))
