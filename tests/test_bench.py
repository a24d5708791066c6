"""`lminf bench`: its numbers are there and hang together; how large they are is nobody's claim."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.support.families import CASES
from lminf_export import Bundle, export, load
from lminf_export.bench.floor import cache_bytes_per_step, weight_bytes_per_step
from lminf_export.bench.profile import summarize
from lminf_export.cli.bench import bench_command
from lminf_export.models.expert_facts import experts_per_token
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.tensors.files import read_header
from lminf_export.verify.routing_check import RoutingWatch
from tests.support.family_bundles import family_folder
from tests.support.tiny_models import save_llama

SETTINGS = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 7}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return export(save_llama(folder / "m"), folder / "b", **SETTINGS)


def run(*arguments):
    return CliRunner().invoke(bench_command, [str(a) for a in arguments])


@pytest.mark.slow
def test_the_report_holds_together(bundle):
    result = run(
        bundle.path, "--json", "--profile", "--batch-sizes", "1,3", "--prefill-tokens", 41,
        "--decode-tokens", 10, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(r["batch_size"], r["position"]) for r in report["decode"]] == [
        (batch, position) for batch in (1, 3) for position in (19, 8 * 19, 64 * 19, 10**6)
    ]
    for row in report["decode"]:
        assert row["ratio_to_floor"] == pytest.approx(row["ms_per_step"] / row["floor_ms"])
        assert row["floor_ms"] == pytest.approx(1e3 * row["bytes_per_step"] / report["bandwidth"])
    first, memory = report["first_token"], report["memory"]
    assert first["process"] >= first["imports"] + first["load"] + first["step"] > 0
    assert 0 < memory["imports_anonymous"] < memory["anonymous"] < memory["total"]
    assert sum(row["share"] for row in report["profile"]) == pytest.approx(1)
    # Every layer has seven projections and the model one more.
    calls = {r["kind"]: r["calls_per_step"] for r in report["profile"]}
    assert calls.get("Gemm", 0) + calls.get("Linear", 0) + calls.get("LinearAdd", 0) >= 4
    assert report["positions_are_set"] is True
    outside = report["outside_run"]
    assert 0 < outside["forward"] < outside["sampled"]
    assert outside["greedy"] > 0


@pytest.mark.slow
def test_the_table_is_for_people(bundle):
    result = run(
        bundle.path, "--batch-sizes", 1, "--positions", "5,1_000", "--decode-tokens", 5,
        "--prefill-tokens", 8,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in (
        "tokens/s",
        "load to first token",
        "1,000",
        "ratio",
        "positions are set",
        "µs drawn",
    ):
        assert words in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-sizes", "two"], "batch-sizes"),
        (["--batch-sizes", "0"], "batch_size"),
        (["--batch-sizes", ""], "batch-sizes"),
        (["--prefill-tokens", "0"], "prefill_tokens"),
        (["--positions", str(2**41)], "2**40"),
        (["--threads", "0"], "threads"),
        (["--provider", "cuda"], "cuda"),
    ],
)
def test_what_makes_no_sense_costs_one_line(arguments, words, bundle):
    result = run(bundle.path, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_plan_or_nothing_is_refused(tmp_path):
    assert run(tmp_path / "engine.plan").exit_code == 2
    result = run(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_a_state_set_to_a_position_goes_on_as_one_that_has_read_so_far(bundle):
    model = load(bundle.path)
    read, put = model.new_state(2), model.new_state(2)
    tokens = np.random.default_rng(0).integers(0, 131, (2, 90))
    model.forward(tokens, read, logits="none")
    model.session.stand_at(put, 90)
    model.session.fill(put, np.random.default_rng(0))
    assert put.past_length.tolist() == read.past_length.tolist() == [90, 90]
    assert (put.nbytes, put.capacities) == (read.nbytes, read.capacities)
    # The window's tokens read again behind it make both streams see the same, but for the sinks.
    model.session.stand_at(put, 10**6)
    assert np.isfinite(model.forward(tokens[:, :30], put)).all()
    assert put.past_length.tolist() == [10**6 + 30] * 2


def test_the_floor_counts_what_a_step_reads(bundle):
    stored = read_header(bundle.path / "model.safetensors")
    table = stored["model.embed_tokens.weight"]
    whole = sum(tensor.length for tensor in stored.values())
    for batch in (1, 3):
        row = table.length // table.shape[0]
        assert weight_bytes_per_step(bundle, batch) == whole - table.length + batch * row
    row = 4 * 3 * 2 * 2 * 10  # float32, layers, keys and values, heads, dimension
    assert cache_bytes_per_step(bundle, 4) == 5 * row
    assert cache_bytes_per_step(bundle, 20) == (19 + 2) * row
    assert cache_bytes_per_step(bundle, 10**6) == (19 + 3) * row


EXPERT_CASES = [case for case in CASES if "experts" in case.special]
# These two name their number of chosen experts as no other family does.
QUICK = ("hunyuan_v1_moe", "ernie4_5_moe")


@pytest.mark.sampled
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.model_type, marks=() if case.model_type in QUICK else SLOW)
        for case in EXPERT_CASES
    ],
)
def test_the_floor_counts_the_experts_that_a_token_takes(case, made_once):
    bundle = Bundle.open(family_folder(made_once, case) / "b")
    watch = RoutingWatch(load(bundle.path).session, bundle)
    LanguageModel(bundle, watch.session).forward(np.array([[5]]), watch.session.new_state(1))
    taken = {layer.shape for layer in watch.take(1)}
    assert taken == {(1, experts_per_token(case.config()))}
    ((_, top_k),) = taken
    assert top_k > 1, "with one expert a token this test shows nothing"

    stored = read_header(bundle.path / "model.safetensors")
    stacks = [tensor for name, tensor in stored.items() if is_expert_tensor(name)]
    assert len({tensor.shape[0] for tensor in stacks}) == 1
    expert = sum(tensor.length for tensor in stacks) // stacks[0].shape[0]
    table = stored["model.embed_tokens.weight"]
    whole = sum(tensor.length for tensor in stored.values())
    rest = whole - sum(tensor.length for tensor in stacks) - table.length
    row = table.length // table.shape[0]
    assert weight_bytes_per_step(bundle, 1) == rest + top_k * expert + row
    every = stacks[0].shape[0] * expert
    assert weight_bytes_per_step(bundle, 100) == rest + every + 100 * row


def is_expert_tensor(name):
    """Whether a stack of experts' matrices, or a table of their biases."""
    return re.search(r"\.experts\.\w+$", name) is not None and "correction" not in name


def test_a_profile_counts_the_last_steps_only():
    def event(name, ts, dur, kind=None):
        args = {"op_name": kind} if kind else {}
        category = "Node" if kind else "Session"
        return {"cat": category, "name": name, "ts": ts, "dur": dur, "args": args}

    events = []
    for begin, dur in ((0, 900), (1000, 30), (2000, 10)):
        events.append(event("model_run", begin, 999))
        events.append(event("a_kernel_time", begin + 1, dur, "MatMul"))
        events.append(event("a_fence_before", begin + 2, 7, "MatMul"))
        events.append(event("b_kernel_time", begin + 3, 20, "Add"))
    first, second = summarize(events, steps=2)
    assert (first.kind, first.ms_per_step, first.calls_per_step) == ("MatMul", 0.02, 1)
    assert (second.kind, second.ms_per_step, second.share) == ("Add", 0.02, 0.5)
