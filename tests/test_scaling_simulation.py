"""The simulated fleet: no turn is lost on the way, queues are Erlang's, a seed decides all."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

simpy = pytest.importorskip("simpy")

from benchmarks.scaling import fleet as fleet_module  # noqa: E402
from benchmarks.scaling.fleet import LOST, Fleet  # noqa: E402
from benchmarks.scaling.host import Host, Job  # noqa: E402
from benchmarks.scaling.ring import Ring  # noqa: E402
from benchmarks.scaling.settings import FleetSettings, Sizes, Times, measured  # noqa: E402
from benchmarks.scaling.simulate import SCENARIOS, simulated  # noqa: E402
from lminf_export.capacity.queueing import mean_wait, waiting_probability  # noqa: E402
from lminf_export.errors import ConfigError, InputError  # noqa: E402
from tests.support.benchmarks import benchmark  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
STEP, PIECE = 0.002, (0.001, 0.0001)
TIMES = Times(
    step=tuple(STEP * (1 + 0.2 * more) for more in range(4)),
    chunk=64,
    piece=PIECE,
    start=0.5,
    snapshot=0.0003,
    restore=0.0002,
    save=0.008,
    load=0.005,
)
SIZES = Sizes(kept=1_000_000, stored=900_000, full_per_token=3_000)
SMALL = FleetSettings(
    sessions=700,
    hosts=11,
    slots=4,
    max_waiting=5,
    session_bytes=30_000_000,
    ring_points=50,
    answers_per_hour=40,
    zipf_shift=20,
    answer_tokens=500,
    history_median=2_000,
    seconds=900,
    warm_up=100,
    lifetime=2_000,
    noticed=2,
    recovery=20,
    drain_share=0.2,
    drain_grace=3,
)
CASES = {name: replace(SMALL, **changes) for name, changes in SCENARIOS.items()}


def new_host(env, times, slots, done):
    return Host(env, 0, times, slots, 10**9, 10**9, done)


def submit(host, job):
    host.jobs[job] = None
    job.host = host
    assert host.submit(job)
    return job


def test_a_lone_answer_takes_its_turns():
    env, ends = simpy.Environment(), {}
    host = new_host(env, TIMES, 4, lambda job: ends.setdefault(job, env.now))
    job = Job(None, 0.0, 0, 101)
    job.read = 130
    submit(host, job)
    env.run()
    first = 3 * PIECE[0] + 130 * PIECE[1]
    assert job.first == pytest.approx(first)
    assert ends[job] == pytest.approx(first + 100 * STEP, rel=1e-6)


def test_an_answer_of_one_token_ends_with_its_prompt():
    env, ends = simpy.Environment(), {}
    host = new_host(env, TIMES, 4, lambda job: ends.setdefault(job, env.now))
    job = Job(None, 0.0, 0, 1)
    job.read = 50
    submit(host, job)
    env.run()
    assert ends[job] == job.first == pytest.approx(TIMES.piece_seconds(50), rel=1e-6)


def test_a_clock_that_cannot_tell_the_rest_of_a_turn_goes_on():
    """Behind so many seconds the clock's steps are longer than those of a short turn."""
    env, ends = simpy.Environment(initial_time=1e9), []
    times = replace(TIMES, step=(3e-7,), piece=(3e-7, 1e-9))
    host = new_host(env, times, 1, ends.append)
    for read in range(1, 40):
        job = Job(None, env.now, 0, 3)
        job.read = read
        submit(host, job)
    for _ in range(2_000):
        if len(ends) == 39:
            break
        env.step()
    assert len(ends) == 39


def test_a_prompt_is_read_between_steps_of_others():
    """Whoever writes gets a token with each piece; the reader waits for their steps."""
    env, ends = simpy.Environment(), {}
    host = new_host(env, TIMES, 4, lambda job: ends.setdefault(job, env.now))
    writer, reader = Job(None, 0.0, 0, 51), Job(None, 0.0, 0, 2)
    submit(host, writer)
    reader.read = 10 * 64
    submit(host, reader)
    env.run()
    piece = TIMES.piece_seconds(64)
    assert reader.first == pytest.approx(10 * (STEP + piece), rel=1e-6)
    # Ten turns beside the reader, one beside its answer, the rest alone.
    wanted = 10 * (STEP + piece) + TIMES.step[1] + 39 * STEP
    assert ends[writer] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("servers", "share"), [(1, 0.6), (3, 0.7), (8, 0.8)])
def test_waits_are_those_of_erlang(servers, share):
    """Steps that take the same time however many write make a host an M/M/c queue."""
    tokens, count = 1_000.0, 40_000
    times = replace(TIMES, step=(STEP,) * servers)
    service = 1 / (tokens * STEP)
    arrivals = share * servers * service
    random = np.random.default_rng(servers)
    env, done = simpy.Environment(), []
    host = new_host(env, times, servers, done.append)

    def arrive():
        for gap, size in zip(
            random.exponential(1 / arrivals, count), random.exponential(tokens, count), strict=True
        ):
            yield env.timeout(gap)
            submit(host, Job(None, env.now, 0, size + 1))

    env.process(arrive())
    env.run()
    assert len(done) == count
    waits = np.array([job.first for job in done])
    # Waits of neighbours are alike, so the means of 40,000 scatter by some percent.
    wanted = waiting_probability(servers, share * servers)
    assert (waits > 1e-4).mean() == pytest.approx(wanted, rel=0.08)
    assert waits.mean() == pytest.approx(mean_wait(servers, arrivals, service), rel=0.15)
    host.settle()
    assert host.busy_seconds / env.now == pytest.approx(share * servers, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_every_turn_that_arrives_is_answered_or_counted_as_refused(name):
    found = simulated(CASES[name], TIMES, SIZES)
    events = found["events"]
    refused = sum(count for event, count in events.items() if event.startswith("refused"))
    assert events["arrived"] == events["answered"] + refused
    assert events["arrived"] == pytest.approx(700 * 40 * 900 / 3600, rel=0.1)
    assert found["first_token"]["all"]["turns"] == events["answered"]
    kinds = {kind: row["turns"] for kind, row in found["first_token"].items() if kind != "all"}
    assert sum(kinds.values()) == events["answered"]
    stores = CASES[name].elsewhere == "store"
    assert ("store" in kinds) is stores
    assert ("reread" in kinds) is not stores
    assert LOST not in events if stores or "nothing fails" in name else events[LOST] > 0
    if CASES[name].lifetime is not None:
        assert events["servers that failed"] > 0
        assert events["servers that were replaced"] > 0
        assert kinds["asked again"] > 0
    else:
        assert "asked again" not in kinds


def test_sessions_come_back_as_often_as_their_rank_says():
    settings = replace(CASES["store, nothing fails"], warm_up=0.0)
    fleet, found = Fleet(settings, TIMES, SIZES), Counter()
    arrive = fleet._arrive
    fleet._arrive = lambda number, *sizes: (found.update([number]), arrive(number, *sizes))
    fleet.run()
    weights = (np.arange(700) + 1.0 + settings.zipf_shift) ** -settings.zipf_exponent
    for first, behind in ((0, 10), (10, 100), (100, 700)):
        wanted = weights[first:behind].sum() / weights.sum() * found.total()
        counted = sum(found[number] for number in range(first, behind))
        # The counts scatter like those of a Poisson process.
        assert counted == pytest.approx(wanted, abs=4 * wanted**0.5)


def test_servers_fail_as_often_as_they_live():
    settings = replace(SMALL, sessions=1, seconds=20_000, lifetime=500, drain_share=0.0, recovery=0)
    fleet = Fleet(settings, replace(TIMES, start=1e-3), SIZES)
    found = fleet.run().events["servers that failed"]
    wanted = 11 * 20_000 / (500 + settings.noticed)
    assert found == pytest.approx(wanted, abs=4 * wanted**0.5)


def test_what_is_lost_before_the_time_that_counts_is_not_counted():
    settings = replace(CASES["no store"], seconds=1e-6, warm_up=3_000, drain_share=0.0)
    assert LOST not in simulated(settings, TIMES, SIZES)["events"]


def test_where_there_is_no_store_none_is_asked():
    slow = {"store_latency": 0.5}
    calm = "no store, nothing fails"
    found = simulated(replace(CASES[calm], **slow), TIMES, SIZES)["first_token"]["memory"]
    assert found["p50_ms"] < 100
    asked = simulated(replace(CASES["store, nothing fails"], **slow), TIMES, SIZES)["first_token"]
    assert asked["memory"]["p50_ms"] > 500


def test_states_move_as_often_as_they_are_counted():
    found = simulated(CASES["store, nothing fails"], TIMES, SIZES)
    moved = found["network_bytes"]
    assert moved["read"] == SIZES.stored * found["first_token"]["store"]["turns"]
    assert moved["written"] == SIZES.stored * found["events"]["answered"]


def test_a_seed_decides_everything():
    def run(**changes):
        found = simulated(replace(CASES["store"], **changes), TIMES, SIZES)
        del found["cpu_seconds"]
        return found

    assert run() == run()
    assert run(seed=1) != run()


def test_an_answer_that_is_not_durable_yet_is_asked_again(monkeypatch):
    """Between its last token and the store's yes a server may fail: the turn does not count."""
    settings = replace(SMALL, drain_share=0.0, lifetime=None, hosts=2, sessions=1, warm_up=0.0)
    fleet = Fleet(settings, replace(TIMES, save=5.0), SIZES)
    written = []
    # As the hosts hold it.
    for host in fleet.hosts:
        done = host._done
        monkeypatch.setattr(host, "_done", lambda job, done=done: (written.append(job), done(job)))
    fleet._end = 100.0
    fleet._arrive(0, 10, 20)
    while not written:
        fleet.env.step()
    [job] = written
    first, conversation = job.host, job.session
    assert (conversation.version, conversation.stored) == (0, 0)
    fleet.env.process(fleet._down(first, 1.0, 1000.0, "asked again"))
    while fleet._on_their_way:
        fleet.env.step()
    assert written == [job, job]
    assert job.host is not first
    assert (conversation.version, conversation.stored) == (1, 1)
    assert fleet.counts.events["answered"] == 1


def test_a_dead_server_takes_and_writes_nothing():
    fleet = Fleet(replace(SMALL, warm_up=0.0, max_waiting=20), TIMES, SIZES)
    dead = fleet.hosts[:6]
    for host in dead:
        host.is_up = False
        fleet._let(host, takes=False)
    for session in range(40):
        fleet._arrive(session, 5, 7)
    while fleet._on_their_way:
        fleet.env.step()
    assert fleet.counts.events["answered"] == 40
    assert not [host for host in dead if host.memory or host.jobs]
    job = Job(None, 0.0, 0, 3)
    with pytest.raises(AssertionError, match="dead server"):
        dead[0].submit(job)


def test_a_server_beyond_its_bound_leaves_turns_to_the_next():
    fleet = Fleet(replace(SMALL, warm_up=0.0, load_bound=1.0), TIMES, SIZES)
    for session in range(44):
        fleet._arrive(session, 5, 7)
    loads = [len(host.jobs) for host in fleet.hosts]
    assert sum(loads) == 44
    assert max(loads) <= 4, "there was a slot for each"


def test_memory_keeps_the_latest_used_within_its_bytes():
    host = new_host(simpy.Environment(), TIMES, 1, lambda job: None)
    host._most_bytes = 100
    for session in range(5):
        assert host.keep(session, 1, 30)
    assert list(host.memory) == [2, 3, 4]
    assert host.keep(2, 2, 60)
    assert list(host.memory) == [4, 2]
    assert not host.keep(9, 1, 101)
    assert not host.keep(9, 1, 50, is_latest=False)


def test_few_sessions_move_when_a_host_goes():
    ring = Ring(20, 100)
    homes = [ring.home(session) for session in range(4_000)]
    counts = Counter(homes)
    assert len(counts) == 20
    assert max(counts.values()) < 1.6 * 200
    for session in range(200):
        order = list(ring.hosts(session))
        assert sorted(order) == list(range(20))
        assert order[0] == homes[session]
    # Those of a host that goes are taken over by all the others.
    takers = {next(h for h in ring.hosts(s) if h != 3) for s in range(4_000) if homes[s] == 3}
    assert len(takers) > 10


def test_the_committed_parameters_are_of_one_machine_and_full_states():
    times, sizes, found = measured(RESULTS / "scaling_parameters.json")
    assert len(times.step) == 8
    assert times.step[0] < times.step[-1] < 8 * times.step[0], "a batch is worth it"
    assert sizes.kept == found["kept_bytes"]
    assert times.piece_seconds(256) == pytest.approx(found["prompt_ms"]["256"] / 1e3)
    assert times.piece[1] > 0


def test_the_committed_simulation_is_of_the_committed_parameters():
    result = json.loads((RESULTS / "scaling_simulation.json").read_text())
    times, sizes, _ = measured(RESULTS / "scaling_parameters.json")
    assert result["times"] == json.loads(json.dumps(vars(times)))
    assert result["sizes"] == vars(sizes)
    assert {name: row["differs"] for name, row in result["scenarios"].items()} == SCENARIOS
    assert result["settings"] == vars(FleetSettings())
    for name, row in result["scenarios"].items():
        if SCENARIOS[name].get("elsewhere") != "reread":
            assert LOST not in row["events"], name


def changed_parameters(folder, change):
    """The committed parameters with something else in them."""
    found = json.loads((RESULTS / "scaling_parameters.json").read_text())
    change(found)
    path = folder / "changed.json"
    path.write_text(json.dumps(found))
    return path


def test_other_times_are_another_simulation(tmp_path):
    def slower(found):
        found["step_ms"] = {count: 3 * ms for count, ms in found["step_ms"].items()}

    settings = replace(CASES["store, nothing fails"], slots=8)
    before, after = (
        simulated(settings, *measured(path)[:2])
        for path in (RESULTS / "scaling_parameters.json", changed_parameters(tmp_path, slower))
    )
    assert before["events"] != after["events"] or before["first_token"] != after["first_token"]
    assert after["busy_slots"] > 2.5 * before["busy_slots"]


def without(name):
    return lambda found: found.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("environment"), "'environment' is not there"),
        (without("start_seconds"), "'start_seconds' is not there"),
        (lambda found: found["step_ms"].update({"3": -1}), "step_ms 3=-1.0: must be above 0"),
        (lambda found: found["step_ms"].update({"3": math.nan}), "step_ms 3=nan: must be a finite"),
        (lambda found: found["step_ms"].pop("3"), "not each of 1 … n streams"),
        (lambda found: found.update(step_ms={}), "step_ms has nothing"),
        (lambda found: found.update(prompt_ms={"256": 25.0}), "fewer than two lengths"),
        (lambda found: found["prompt_ms"].update({"256": 1e-3}), "is not above 0 for every"),
        (lambda found: found["states"][-1].update(stored_bytes=0), "stored_bytes=0: must be at"),
        (lambda found: found.update(states=[]), "'tokens' is not there"),
        (lambda found: found["states"].pop(), "its states are not full"),
    ],
)
def test_a_time_that_nobody_measured_is_named(change, words, tmp_path):
    with pytest.raises(InputError, match=re.escape(words)):
        measured(changed_parameters(tmp_path, change))


def test_servers_have_no_more_slots_than_streams_were_measured():
    with pytest.raises(ConfigError, match="slots=5: steps of 4 streams at most were measured"):
        Fleet(replace(SMALL, slots=5), TIMES, SIZES)


@pytest.mark.slow
def test_parameters_are_measured_and_simulated(demo_bundle, tmp_path):
    parameters, out = tmp_path / "parameters.json", tmp_path / "simulation.json"
    benchmark("scaling.parameters", demo_bundle, "--rounds", 1, "--slots", 2, "--out", parameters)
    assert set(json.loads(parameters.read_text())["step_ms"]) == {"1", "2"}
    sizes = ("--sessions", 500, "--hosts", 5, "--seconds", 60, "--warm-up", 10)
    assumed = ("--answer-tokens", 99, "--zipf-exponent", 0.5)
    benchmark("scaling.simulate", "--parameters", parameters, *sizes, *assumed, "--out", out)
    found = json.loads(out.read_text())
    assert set(found["scenarios"]) == set(SCENARIOS)
    settings = found["settings"]
    assert (settings["slots"], settings["answer_tokens"], settings["zipf_exponent"]) == (2, 99, 0.5)


def test_requests_are_drawn_in_batches_and_not_twice(monkeypatch):
    """A run behind the first batch of random numbers goes on with others."""
    monkeypatch.setattr(fleet_module, "_BATCH", 50)
    found = simulated(CASES["store, nothing fails"], TIMES, SIZES)
    assert found["events"]["arrived"] == pytest.approx(7_000, rel=0.05)


def failing(name, *arguments):
    """Run a script that is to end in one line and with 2; return the line."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)],
        cwd=RESULTS.parents[1], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--parameters", "/nonexist"), "/nonexist: No such file"),
        (
            ("--parameters", RESULTS / "ray_fleet.json"),
            "no result of benchmarks.scaling.parameters",
        ),
        (("--hosts", 0), "hosts=0: must be at least 1"),
        (("--sessions", -5), "sessions=-5: must be at least 1"),
        (("--seconds", "nan"), "seconds=nan: must be a finite number"),
        (("--lifetime", "inf"), "lifetime=inf: must be a finite number"),
        (("--warm-up", -1), "warm_up=-1.0: must be 0 at least"),
        (("--jobs", 0), "jobs=0: must be at least 1"),
        (("--slots", 9), "slots=9: steps of 8 streams at most were measured"),
        (("--answer-tokens", 0.5), "answer_tokens=0.5: must be 1 …"),
    ],
)
def test_a_simulation_that_cannot_be_asked_for_costs_one_line(arguments, words):
    known = ("--parameters", RESULTS / "scaling_parameters.json")
    assert words in failing("scaling.simulate", *known, *arguments)


def test_times_are_not_measured_in_no_rounds():
    line = failing("scaling.parameters", "/nonexist", "--rounds", 0)
    assert "rounds=0: must be at least 1" in line


@pytest.mark.parametrize(
    "name",
    ["load_report", "ray_fleet", "session_moves", "parked_sessions", "implicit_state",
     "parameters"],
)  # fmt: skip
def test_a_bundle_that_is_not_there_costs_one_line(name):
    if name in ("session_moves", "ray_fleet", "load_report", "parked_sessions"):
        pytest.importorskip("httpx")
    given = ("/nonexist",) if name == "parameters" else ("--bundle", "/nonexist")
    assert "/nonexist does not exist" in failing(f"scaling.{name}", *given)
