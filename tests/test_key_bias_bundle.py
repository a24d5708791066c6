"""Bundles of models whose keys have a large bias, with an int8 cache: exact but for a rounding."""

from __future__ import annotations

import json
import logging

import numpy as np
import onnx
import pytest
import torch

import lminf_export
from benchmarks.support.families import CASES
from lminf_export.models.base import AttentionPlan, build_model, use_step
from lminf_export.models.key_bias import named_key_biases
from lminf_export.models.registry import find_family
from lminf_export.operator.contract import INT8_CACHE_OP_TYPE, KEY_BIAS_OP_TYPE
from lminf_export.verify.validate import validate
from tests.support.biased_models import save_qwen2
from tests.support.kernel_sets import needs_kernels

WINDOW, CHUNK, SINKS = 29, 7, 3
TOKENS = np.random.default_rng(5).integers(0, 131, 200)


def exported(model, out, **options):
    settings = {"window_size": WINDOW, "chunk_size": CHUNK, "num_sink_tokens": SINKS}
    return lminf_export.export(model, out, **{**settings, "kv_cache_dtype": "int8", **options})


def logits(bundle, kernels="auto"):
    model = lminf_export.load(bundle.path, kernels=kernels)
    return model.forward(TOKENS[None], model.new_state(1))[0].copy()


def error(found, wanted):
    return float(np.abs(found - wanted).max() / (wanted.max() - wanted.min()))


@pytest.fixture(scope="module", params=[300.0, 900.0])
def model(request, tmp_path_factory):
    return save_qwen2(tmp_path_factory.mktemp("m") / f"qwen2-{request.param:.0f}", request.param)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return exported(model, tmp_path_factory.mktemp("b") / "int8")


@pytest.fixture(scope="module")
def before(model, tmp_path_factory):
    """A bundle as versions wrote it that rounded biases with their keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionPlan, "keeps_bias_out", lambda *_: False)
        return exported(model, tmp_path_factory.mktemp("b") / "before")


@pytest.fixture(scope="module")
def error_without_bias(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbiased")
    unbiased = save_qwen2(folder / "m", 0.0)
    rounded = logits(exported(unbiased, folder / "int8"))
    return error(rounded, logits(exported(unbiased, folder / "exact", kv_cache_dtype="auto")))


@pytest.mark.slow
def test_rounding_errs_little_more_than_without_a_bias(
    model, bundle, before, error_without_bias, tmp_path
):
    exact = logits(exported(model, tmp_path / "exact", kv_cache_dtype="auto"))
    assert error(logits(bundle), exact) < 4 * error_without_bias
    assert error(logits(before), exact) > 5 * error(logits(bundle), exact)


@pytest.mark.parametrize("kernels", ["none", pytest.param("auto", marks=needs_kernels)])
def test_a_bundle_computes_the_specification(bundle, kernels):
    report = validate(bundle.path, num_tokens=131, kernels=kernels)
    assert report.passed


def test_a_graph_of_before_is_held_to_what_it_says(before):
    graph = onnx.load(before.graph_path, load_external_data=False).graph
    assert INT8_CACHE_OP_TYPE in {node.op_type for node in graph.node}
    report = validate(before.path, num_tokens=131)
    # It computes what it says, and that is not worth much.
    assert all(row.passed for row in (*report.comparisons, *report.rings))
    assert report.ring_cost.is_notable


def test_every_layer_reads_its_own_bias_from_the_weights(bundle):
    graph = onnx.load(bundle.graph_path, load_external_data=False).graph
    made = {name: node for node in graph.node for name in node.output}
    nodes = [node for node in graph.node if node.op_type == KEY_BIAS_OP_TYPE]
    biases = [made[node.input[19]].input[0] for node in nodes]
    assert biases == [f"model.layers.{i}.self_attn.k_proj.bias" for i in range(3)]


def test_a_snapshot_continues_as_if_nothing_had_happened(bundle):
    model = lminf_export.load(bundle.path)
    state = model.new_state(1)
    model.forward(TOKENS[None, :90], state)
    saved = model.session.snapshot(state)
    wanted = model.forward(TOKENS[None, 90:], state).copy()
    again = model.new_state(1)
    model.session.restore(again, saved)
    np.testing.assert_array_equal(model.forward(TOKENS[None, 90:], again), wanted)


@pytest.mark.slow
def test_a_large_bias_is_named_where_rings_round_and_nowhere_else(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        large = save_qwen2(tmp_path / "large", 300.0)
        bundle = exported(large, tmp_path / "b")
    assert any("a bias of norm 424" in notice for notice in bundle.manifest.notices)
    assert all(len(notice) <= 300 for notice in bundle.manifest.notices)
    assert "a bias of norm 424" in caplog.text
    for name, source, options in (
        ("exact", large, {"kv_cache_dtype": "auto"}),
        ("small", save_qwen2(tmp_path / "none", 1.0), {}),
    ):
        notices = json.dumps(exported(source, tmp_path / name, **options).manifest.notices)
        assert "bias" not in notices


class _Keys:
    """Answers attention by each token's own value, and keeps the first layer's call."""

    def __init__(self):
        self.call = None

    def attend(self, call):
        self.call = self.call or call
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)


def first_call(family, model):
    keys = _Keys()
    with torch.no_grad(), family.patched(model), use_step(keys):
        model(input_ids=torch.tensor([[3, 5, 7]]), use_cache=False)
    return keys.call


# Whether a family's keys have a bias that a ring may keep out.
KEY_BIAS = {"qwen2": True, "gpt_neox": True, "phi": False, "starcoder2": True, "llama": False}


@pytest.mark.parametrize("name", KEY_BIAS)
def test_the_bias_that_is_found_is_the_one_that_keys_hold(name):
    case = next(case for case in CASES if case.model_type == name)
    torch.manual_seed(0)
    model = build_model(case.config(), torch.float32, device="cpu")
    family = find_family(name)
    before = first_call(family, model)
    if not KEY_BIAS[name]:
        assert before.key_bias() is None
        return
    old = before.key_bias().clone()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter, _ in named_key_biases(model):
            parameters[parameter] += torch.randn(parameters[parameter].shape)
    after = first_call(family, model)
    added = (after.key_bias() - old)[None, :, None].expand_as(before.key)
    torch.testing.assert_close(after.key - before.key, added, rtol=0, atol=1e-4)
