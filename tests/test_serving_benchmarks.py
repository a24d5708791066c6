"""The benchmarks of serving run, at tiny sizes; what they measure is nobody's claim here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import serving
from tests.support.benchmarks import benchmark


@pytest.mark.slow
def test_clients_read_answers_of_exact_lengths(demo_lm):
    with serving.server_thread(demo_lm, slots=2) as server:
        asked = ("--url", f"{server.url}/v1", "--clients", 3, "--rounds", 1)
        exact = ("--prompt-tokens", 40, "--new-tokens", 9)
        for kind in ("lminf", "other"):
            output = benchmark("serving.clients", *asked, *exact, "--kind", kind, "--eos", 2)
            found = json.loads(output.splitlines()[-1])
            (turn,) = found["rounds"]
            assert turn["errors"] == []
            assert (turn["prompt_tokens"], turn["new_tokens"]) == (120, 27)
            assert turn["new_tokens_per_second"] > 0
            assert turn["first_token_ms"]["largest"] >= turn["first_token_ms"]["median"] > 0


@pytest.mark.slow
def test_a_race_of_servers_goes_on_and_names_who_is_missing(demo_bundle, tmp_path):
    out = tmp_path / "race.json"
    settings = ("--work", tmp_path / "work", "--fp32", demo_bundle, "--threads", 1, "--out", out)
    sizes = ("--clients", 2, "--prompt-tokens", 30, "--new-tokens", 5, "--more-tokens", 4)
    benchmark("serving.race", *settings, *sizes, "--rounds", 1, "--follow-rounds", 1)
    first = json.loads(out.read_text())["sections"]["fp32-1"]
    benchmark("serving.race", *settings, *sizes, "--rounds", 2, "--follow-rounds", 1)
    sections = json.loads(out.read_text())["sections"]
    found = sections["fp32-1"]
    assert found["rounds"][0] == first["rounds"][0], "rounds that are there stay"
    assert len(found["rounds"]) == 2
    assert found["rows"]["ours fp32"]["errors"] == 0
    assert found["rows"]["ours fp32"]["kept_over_stateless"] > 0
    assert found["refused"]["llama-server f32"] == "not prepared"
    assert set(sections["quantized-1"]["refused"]) == {
        "ours int4", "llama-server q4_k_m", "genai int4, one batch",
    }  # fmt: skip


@pytest.mark.slow
def test_overhead_is_measured_for_every_kind_of_reader(demo_bundle, tmp_path):
    out = tmp_path / "overhead.json"
    tiny = ("--bundle", demo_bundle, "--rounds", 1, "--steps", 20, "--http-tokens", 20)
    benchmark("serving.overhead", *tiny, "--slots", 2, "--sections", "engine", "--out", out)
    benchmark("serving.overhead", *tiny, "--slots", 2, "--sections", "http", "--out", out)
    found = json.loads(out.read_text())
    assert set(found["engine"]["readers"]) == {"nobody", "threads", "asyncio"}
    for row in found["engine"]["readers"].values():
        assert min(row["turn_ms"], row["step_ms"]) > 0
    assert found["engine"]["without_step"]["turn_us"] > 0
    assert found["http"]["http_over_engine"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_a_long_stream_is_watched_while_others_come_and_go(demo_bundle, tmp_path):
    out = tmp_path / "long.json"
    few = ("--visitors", 2, "--warm-up-visits", 5, "--pause", 0.01, "--sample-seconds", 0.02)
    benchmark("serving.long_stream", "--bundle", demo_bundle, "--tokens", 300, *few, "--out", out)
    found = json.loads(out.read_text())
    assert found["answer"]["error"] is None
    assert found["answer"]["tokens"] == 300
    assert found["visitors"]["failed"] == 0
    assert found["visitors"]["answered"] >= 6
    assert found["visitors"]["refused"] >= 2
    assert found["memory"]["least_bytes"] <= found["memory"]["median_bytes"]
