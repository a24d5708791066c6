"""Capacity plans: bytes are those of real states, slots and stores; queues are Erlang's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.scaling.capacity import is_alike
from lminf_export import (
    CapacityOptions,
    ConfigError,
    Engine,
    InputError,
    ReplicaSpeed,
    SessionActivity,
    load,
    plan_capacity,
)
from lminf_export.bundle.folder import Bundle
from lminf_export.capacity.queueing import (
    mean_wait,
    most_arrivals,
    waiting_probability,
    waits_longer,
)
from lminf_export.capacity.sizes import StateSizes
from lminf_export.cli.byte_sizes import ByteSize
from lminf_export.cli.capacity import capacity_command
from lminf_export.cli.main import cli
from lminf_export.cli.serve import serve_command
from lminf_export.cli.terminal import json_text
from lminf_export.runtime.batching.engine import MOST_SLOTS
from lminf_export.runtime.batching.request import Kept, Request
from lminf_export.runtime.parking.session_store import SessionStore
from lminf_export.runtime.sampling import SamplingConfig
from lminf_export.serve.rolling import RollingHash
from lminf_export.serve.shared_sessions import SharedSessions
from lminf_export.serve.state_store import Conversation, StateStore
from scripts.docs import scaling
from tests.support.tiny_bundle import TinyModel

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "float32": TinyModel(),
    "with a sliding layer": TinyModel(sliding_window=5),
    "float16 without sinks": TinyModel(dtype="float16", num_sink_tokens=0),
    "int8 rings": TinyModel(kv_cache_dtype="int8"),
}
SPEED = ReplicaSpeed(1000.0, 2000.0)


@pytest.fixture(scope="module", params=KINDS)
def lm(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("capacity") / "tiny"
    KINDS[request.param].write(path)
    return load(path, threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("capacity") / "tiny"
    KINDS["float32"].write(path)
    return path


def state_of(lm, tokens):
    state = lm.new_state()
    lm.forward(np.arange(tokens)[None] % lm.vocab_size, state, logits="none")
    return state.snapshot()


def test_a_parked_session_has_the_bytes_of_its_snapshot(lm):
    sizes = StateSizes.of(lm.bundle.manifest)
    full = sizes.full_at
    for tokens in (1, 3, 7, 11, full - 1, full, full + 1, 3 * full):
        assert sizes.state_bytes(tokens) == state_of(lm, tokens).nbytes, tokens
    assert sizes.state_bytes(full - 1) < sizes.state_bytes(full) == sizes.slot_bytes


def test_slots_take_what_the_engine_says(lm):
    with Engine(lm, slots=3) as engine:
        found = engine.stats().cache_bytes
    assert plan_capacity(lm.bundle.path, CapacityOptions(slots=3)).memory.slots == found


def test_sequences_that_wait_for_their_next_turn_take_no_more_than_said(lm):
    """Four endless ones over two slots: whoever gives a slot up waits with its state."""
    request = Request([1, 2, 3], SamplingConfig(temperature=0), stop_token_ids=frozenset())
    request = dataclasses.replace(request, max_new_tokens=None)
    planned = plan_capacity(lm.bundle.path, CapacityOptions(slots=2, max_waiting=2)).memory.waiting
    found = 0
    with Engine(lm, slots=2, max_waiting=2, quantum=5) as engine:
        streams = engine.submit_many(request, 4)
        for _ in itertools.islice(zip(*streams, strict=True), 100):
            found = max(found, engine.stats().parked_bytes)
    assert found == planned


def test_a_kept_conversation_takes_what_the_server_counts(lm):
    sizes, store = StateSizes.of(lm.bundle.manifest), StateStore(1 << 30, 0)
    for tokens in (3, 40):
        conversation = Conversation("text", RollingHash(), Kept(state_of(lm, tokens), ()))
        store.keep_conversation(f"of {tokens}", conversation)
    assert store.counts().nbytes == sizes.kept_bytes(3) + sizes.kept_bytes(40)


def test_a_stored_session_takes_no_more_than_said_and_little_less(lm, tmp_path):
    sizes, store = StateSizes.of(lm.bundle.manifest), SessionStore(tmp_path / "s", ["x" * 32])
    shared = SharedSessions(store)
    for tokens in (3, 1000):
        kept = Kept(state_of(lm, tokens), (7,))
        system = "Be brief. " * 300
        conversation = Conversation("chat", RollingHash(), kept, system=system, turn=1)
        shared.save(f"of {tokens}", conversation)
    shared.close()
    found = sorted(path.stat().st_size for path in (tmp_path / "s").rglob("0*") if path.is_file())
    for size, tokens in zip(found, (3, 1000), strict=True):
        assert size <= sizes.stored_bytes(tokens) < size + 14_000
        assert size > sizes.state_bytes(tokens)


def test_the_parts_of_a_servers_memory_add_up(tiny):
    options = CapacityOptions(5, 3, session_bytes=10**6, reserve_bytes=1000, memory=2 * 10**6)
    memory = plan_capacity(tiny, options).memory
    assert memory.total == sum((memory.weights, memory.slots, memory.spare)) + sum(
        (memory.waiting, memory.prefixes, memory.sessions, memory.reserve)
    )
    assert memory.prefixes == memory.slots
    manifest = load(tiny, threads=1).bundle.manifest
    assert memory.weights == (tiny / "model.onnx.data").stat().st_size
    fit = memory.slots_that_fit
    for slots, is_inside in ((fit, True), (fit + 1, False)):
        changed = CapacityOptions(slots, 3, session_bytes=10**6, reserve_bytes=1000)
        assert (plan_capacity(tiny, changed).memory.total <= 2 * 10**6) is is_inside
    bare = plan_capacity(tiny, CapacityOptions(slots=5, prefix_reuse=False)).memory
    assert (bare.prefixes, bare.slots) == (0, 5 * manifest.cache_bytes_per_sequence)
    with pytest.raises(ConfigError, match="give more memory, or fewer max_waiting"):
        plan_capacity(tiny, CapacityOptions(memory=10**6))


def erlang_c(servers, load):
    """As written in textbooks, with factorials."""
    waiting = load**servers / math.factorial(servers) * servers / (servers - load)
    return waiting / (sum(load**k / math.factorial(k) for k in range(servers)) + waiting)


@pytest.mark.parametrize("servers", [1, 2, 7, 23])
def test_waiting_is_erlangs(servers):
    for share in (0.01, 0.3, 0.83, 0.99):
        assert waiting_probability(servers, share * servers) == pytest.approx(
            erlang_c(servers, share * servers), rel=1e-12
        )
    assert waiting_probability(servers, servers) == 1
    assert waiting_probability(2, 1) == pytest.approx(1 / 3)
    # M/M/1: the mean wait is load / (service − arrivals).
    assert mean_wait(1, 3.0, 4.0) == pytest.approx(0.75)
    assert mean_wait(1, 4.0, 4.0) == math.inf
    # Large numbers neither overflow nor vanish.
    assert 0 < waiting_probability(5000, 4900) < 1


def test_the_most_arrivals_are_just_those_that_wait_as_allowed():
    for servers, service, seconds in itertools.product((1, 8), (0.5, 20.0), (0.0, 1.0)):
        rate = most_arrivals(servers, service, seconds, 0.01)
        assert waits_longer(servers, rate, service, seconds) == pytest.approx(0.01)
        assert waits_longer(servers, rate * 1.01, service, seconds) > 0.01


def test_a_server_answers_what_its_speed_and_the_activity_allow(tiny):
    activity = SessionActivity(
        answers_per_hour=36, answer_tokens=100, prompt_tokens=50, wait_seconds=2
    )
    found = plan_capacity(tiny, CapacityOptions(slots=4), activity, SPEED).load
    seconds = 100 / 1000 + 50 / 2000
    rate = most_arrivals(4, 1 / (4 * seconds), 2, 0.01)
    assert found.answers_per_second == pytest.approx(rate)
    assert found.utilization == pytest.approx(rate * seconds)
    assert found.sessions == int(rate * 100)
    assert found.limited_by == "slots"
    slow = CapacityOptions(slots=4, bandwidth_gbits=1e-4, sessions=1000)
    limited = plan_capacity(tiny, slow, activity, SPEED)
    assert limited.load.limited_by == "bandwidth"
    assert limited.load.store_gbits == pytest.approx(1e-4)
    assert limited.load.sessions < found.sessions
    assert limited.fleet.servers == -(-1000 // limited.load.sessions)
    stored = StateSizes.of(load(tiny, threads=1).bundle.manifest).stored_bytes(10**6)
    assert limited.fleet.store_bytes == 1000 * stored
    assert limited.sizes[0].move_ms == pytest.approx(8e3 * limited.sizes[0].stored_bytes / 1e5)


def capacity(*arguments):
    return CliRunner().invoke(cli, ["capacity", *map(str, arguments)], env={"COLUMNS": "120"})


def test_programs_get_what_the_function_returns(tiny):
    asked = ("--json", "--slots", 3, "--memory", "3GiB", "--sessions", 50, "--tokens", 9)
    result = capacity(tiny, *asked, "--tokens-per-second", 1000)
    assert result.exit_code == 0, result.output
    options = CapacityOptions(slots=3, memory=3 << 30, sessions=50, tokens=(9,))
    wanted = plan_capacity(tiny, options, SessionActivity(), ReplicaSpeed(1000.0))
    assert json.loads(result.output) == json.loads(json.dumps(wanted.to_dict()))


def test_people_see_sizes_memory_load_and_fleet(tiny):
    result = capacity(tiny, "--memory", "3Gi", "--sessions", 50, "--tokens-per-second", 1000)
    assert result.exit_code == 0, result.output
    for text in ("a session of tiny", "slots that fit into 3.0 GiB", "answers/s", "1,000,000"):
        assert text in result.output
    unknown = capacity(tiny, "--sessions", 50).output
    assert "unknown; give --tokens-per-second" in unknown
    assert "answers/s" not in unknown


@pytest.mark.parametrize("bandwidth", [1e-9, 1e15])
def test_the_ends_of_what_may_be_asked_are_json(tiny, bandwidth):
    def never(constant):
        raise AssertionError(constant)

    asked = ("--slots", 4_096, "--tokens-per-second", 1e15, "--answers-per-hour", 1e-9)
    result = capacity(tiny, "--json", "--bandwidth", bandwidth, *asked)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output, parse_constant=never)
    assert all(row["move_ms"] > 0 for row in found["sizes"])
    with pytest.raises(ValueError, match="JSON"):
        json_text({"x": math.inf}, allow_nan=False)


def test_no_more_slots_fit_than_a_server_has(tiny):
    memory = plan_capacity(tiny, CapacityOptions(memory=10**15)).memory
    assert memory.slots_that_fit == MOST_SLOTS


@pytest.mark.slow
def test_numbers_stay_beside_their_units_in_a_narrow_terminal(demo_bundle):
    result = CliRunner().invoke(cli, ["capacity", str(demo_bundle)], env={"COLUMNS": "80"})
    rows = [line for line in result.output.splitlines() if " ms │" in line]
    assert len(rows) == 3
    assert all(re.search(r"│ +[\d.]+ [KM]iB │.*B │$", row) for row in rows), rows


def test_no_wait_at_all_is_said_in_words(tiny):
    result = capacity(tiny, "--wait-seconds", 0, "--tokens-per-second", 1000)
    assert "at most 1% of which wait for a slot" in result.output


@pytest.mark.slow
def test_a_speed_can_be_measured(tiny):
    result = capacity(tiny, "--json", "--measure", "--slots", 2, "--threads", 1)
    assert result.exit_code == 0, result.output
    speed = json.loads(result.stdout)["load"]["speed"]
    assert speed["source"] == "measured"
    assert speed["tokens_per_second"] > 0
    assert speed["prompt_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--measure", "--tokens-per-second", 5), "a speed is measured or given"),
        (("--threads", 2, "--tokens-per-second", 5), "which was not asked for"),
        (("--kernels", "bogus"), "which was not asked for"),
        (("--prompt-tokens-per-second", 5), "goes with --tokens-per-second"),
        (("--memory", 1000), "sequences that wait, kept conversations"),
        (("--max-waiting", -1), "--max-waiting"),
        (("--tokens-per-second", 1e-6, "--sessions", 5), "not answer even one session"),
        (("--memory", "8 horses"), "expected bytes, such as"),
        (("--slots", 10_000_000, "--tokens-per-second", 5), "must be at most 4096"),
        (("--slots", 2**63 - 1), "must be at most 4096"),
        (("--bandwidth", 1e-320, "--json"), "bandwidth_gbits=1e-320: must be"),
        (("--bandwidth", 1e308), "bandwidth_gbits=1e+308: must be"),
    ],
)
def test_questions_without_an_answer_cost_one_line(tiny, arguments, told):
    result = capacity(tiny, *arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("1_000", 1000), ("2KiB", 2048), ("1.5Gi", 3 << 29), ("1 GB", 1 << 30), ("3b", 3)],
)
def test_sizes_have_units(text, count):
    assert ByteSize().convert(text, None, None) == count


@pytest.mark.parametrize(
    "make",
    [
        lambda: SessionActivity(answers_per_hour=0),
        lambda: SessionActivity(prompt_tokens=-1),
        lambda: ReplicaSpeed(math.nan),
        lambda: ReplicaSpeed(5.0, 0.0),
        lambda: CapacityOptions(slots=0),
        lambda: CapacityOptions(slots=4_097),
        lambda: CapacityOptions(max_waiting=-1),
        lambda: CapacityOptions(bandwidth_gbits=0),
        lambda: CapacityOptions(bandwidth_gbits=1e-320),
        lambda: CapacityOptions(bandwidth_gbits=1e308),
        lambda: CapacityOptions(sessions=0),
        lambda: CapacityOptions(tokens=(0,)),
        lambda: CapacityOptions(tokens=5),
        lambda: CapacityOptions(tokens="12"),
        lambda: CapacityOptions(prefix_reuse="no"),
        lambda: ReplicaSpeed(None),
        lambda: ReplicaSpeed("5"),
        lambda: ReplicaSpeed(5.0, source="guessed"),
        lambda: SessionActivity(answers_per_hour=None),
    ],
)
def test_settings_outside_their_rules_are_refused(make):
    with pytest.raises(ConfigError, match=r"must be|finite"):
        make()


def test_numbers_of_numpy_are_numbers_of_json(tiny):
    options = CapacityOptions(
        np.int64(3),
        np.int32(5),
        memory=np.int64(3 << 30),
        sessions=np.uint8(9),
        tokens=[np.int8(7)],
    )
    speed = ReplicaSpeed(np.float32(50), np.float64(70))
    found = plan_capacity(tiny, options, SessionActivity(np.float32(2)), speed).to_dict()
    plain = CapacityOptions(3, 5, memory=3 << 30, sessions=9, tokens=(7,))
    wanted = plan_capacity(tiny, plain, SessionActivity(2.0), ReplicaSpeed(50.0, 70.0)).to_dict()
    assert json.dumps(found) == json.dumps(wanted)


@pytest.mark.parametrize("name", ["options", "activity", "speed"])
@pytest.mark.parametrize("value", [{}, 5, "x"])
def test_what_is_no_part_of_a_question_is_refused_by_name(name, value, tiny):
    with pytest.raises(InputError, match=f"{name}=.*: must be a "):
        plan_capacity(tiny, **{name: value})


def test_the_page_names_options_that_there_are():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    known = {
        option
        for command in (capacity_command, serve_command)
        for parameter in command.params
        for option in parameter.opts
    }
    of_others = {"--build-arg", "--from-file", "--generate", "--head", "--node-ip-address"}
    of_benchmarks = {"--bundle", "--locust", "--parameters", "--help"}
    assert not shown - known - of_others - of_benchmarks


@pytest.mark.slow
def test_times_are_of_the_model_and_the_caches_that_are_planned(demo_bundle, tiny):
    path = ROOT / "benchmarks" / "results" / "scaling_parameters.json"
    times = json.loads(path.read_text(encoding="utf-8"))
    manifest = Bundle.open(demo_bundle).manifest
    assert is_alike(manifest, times)
    assert not is_alike(manifest, {**times, "kept_bytes": 1})
    assert not is_alike(Bundle.open(tiny).manifest, times)


@pytest.mark.slow
def test_the_command_of_the_page_prints_its_numbers(demo_bundle):
    command = scaling.command().strip("`\n").replace("\\\n", " ")
    _, name, _, *arguments = shlex.split(command)
    assert name == "capacity"
    found = json.loads(capacity(demo_bundle, "--json", *arguments).stdout)
    wanted = scaling.plan()
    for plan in (found, wanted):
        del plan["bundle"], plan["load"]["speed"]["source"]
    assert found == wanted
