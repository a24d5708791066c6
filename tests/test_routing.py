"""Bundles of mixtures of experts: compared under their own routing, which must be nearly right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.support.families import CASES, CHUNK, WINDOW
from lminf_export import export, load
from lminf_export.bundle.folder import Bundle
from lminf_export.cli.validate import validate_command
from lminf_export.models.expert_facts import Groups
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.verify.routing_check import RoutingWatch, compare_routing, find_choices
from lminf_export.verify.validate import validate
from tests.support.pieces import run_in_pieces

BY_NAME = {case.model_type: case for case in CASES}


@pytest.fixture(scope="module", params=["mixtral", "phimoe"])
def half(request, tmp_path_factory):
    """A bundle in float16; the first router takes the best two, the second one after another."""
    folder = tmp_path_factory.mktemp(request.param)
    source = BY_NAME[request.param].save(folder / "m")
    return export(source, folder / "b", window_size=WINDOW, chunk_size=CHUNK, dtype="float16").path


@pytest.mark.slow
def test_half_precision_is_compared_under_its_own_routing(half):
    report = validate(half, num_tokens=599)
    assert report.passed
    assert len(report.routing) == 2
    for routing in report.routing:
        assert routing.choices == 599 * 3 * 2
        # Random routers tie now and then; without one this test would show nothing.
        assert 0 < routing.differing < 20
        assert 0 < routing.largest_gap <= routing.allowed_gap
    assert report.to_dict()["routing"][0]["differing"] == report.routing[0].differing


@pytest.mark.slow
def test_the_watched_graph_gives_the_logits_of_the_bundle(half):
    bundle = Bundle.open(half)
    assert len(find_choices(bundle)) == 3
    watch = RoutingWatch(load(half).session, bundle)
    tokens = np.random.default_rng(2).integers(0, 131, 101)
    sizes = (1, 5, 2)
    plain = run_in_pieces(load(half), tokens, sizes)
    assert np.array_equal(run_in_pieces(LanguageModel(bundle, watch.session), tokens, sizes), plain)
    routing = watch.take(len(tokens))
    assert [tuple(layer.shape) for layer in routing] == [(101, 2)] * 3
    assert all(int(layer.max()) == 4 and int(layer.min()) == 0 for layer in routing)


@pytest.mark.slow
def test_the_command_line_says_how_experts_were_compared(half):
    result = CliRunner().invoke(validate_command, [str(half)])
    assert result.exit_code == 0, result.output
    assert "logits are compared under the bundle's choices" in result.output
    assert "choices are not the reference's, the furthest by" in result.output
    report = json.loads(CliRunner().invoke(validate_command, [str(half), "--json"]).output)
    assert len(report["routing"]) == 2


def test_a_choice_that_is_no_near_tie_fails():
    scores = [torch.tensor([[0.5, 0.3, 0.2 - 1e-6, 0.2], [0.1, 0.2, 0.3, 0.4]]).double()]
    near = [torch.tensor([[0, 1, 2], [3, 2, 1]])]
    far = [torch.tensor([[0, 1, 2], [3, 2, 0]])]
    report = compare_routing(scores, near, 1e-6)
    assert (report.choices, report.differing, report.passed) == (6, 1, True)
    assert report.largest_gap == pytest.approx(1e-6, rel=0.1)
    report = compare_routing(scores, far, 1e-6)
    assert (report.differing, report.passed) == (2, False)
    assert report.largest_gap == pytest.approx(0.1)


def test_a_choice_is_explained_by_nearly_tied_groups():
    # Six experts in three groups, of which a token takes two: 1.0, 0.7 and 0.7 + 2e-6.
    scores = [torch.tensor([[0.9, 0.1, 0.6, 0.1, 0.4, 0.3 + 2e-6]]).double()]
    groups = Groups(3, 2)
    best = compare_routing(scores, [torch.tensor([[0, 4]])], 1e-6, groups)
    assert (best.differing, best.largest_gap) == (0, 0.0)
    other = compare_routing(scores, [torch.tensor([[0, 2]])], 1e-6, groups)
    assert (other.differing, other.passed) == (1, True)
    assert other.largest_gap == pytest.approx(1e-6, rel=0.1)
    # No tie of groups explains an expert that is not the best of its own.
    far = compare_routing(scores, [torch.tensor([[0, 3]])], 1e-6, groups)
    assert not far.passed
    assert far.largest_gap == pytest.approx(0.5, rel=0.1)
    # Nor is a group far behind a near-tie: only half of its gap of 0.3 counts, which is plenty.
    behind = compare_routing(scores, [torch.tensor([[2, 4]])], 1e-6, groups)
    assert not behind.passed
    assert behind.largest_gap == pytest.approx(0.15, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4_moe", "dots1"])
def test_half_precision_may_take_another_group(name, tmp_path):
    source = BY_NAME[name].save(tmp_path / "m", seed=1)  # of this one both families have near-ties
    config = {"window_size": WINDOW, "chunk_size": CHUNK, "dtype": "float16"}
    report = validate(export(source, tmp_path / "b", **config).path, num_tokens=599)
    assert report.passed
    for routing in report.routing:
        assert 0 < routing.differing < 20
        assert 0 < routing.largest_gap <= routing.allowed_gap


@pytest.mark.slow
def test_dense_bundles_have_no_routing(tmp_path):
    source = BY_NAME["llama"].save(tmp_path / "m")
    bundle = export(source, tmp_path / "b", window_size=WINDOW, chunk_size=CHUNK)
    assert find_choices(bundle) == []
    assert validate(bundle.path).routing == ()
