"""The benchmarks run, at tiny sizes; what they measure is nobody's claim here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lminf_export
from lminf_export.runtime.kernels import INSTALLED
from tests.support.benchmarks import benchmark
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama


@pytest.mark.slow
def test_peers_race_in_turns_and_say_who_is_missing(tmp_path):
    """Peers that are not installed are named in the result, with the reason."""
    tiny = ("--shape", "tiny", "--work", tmp_path / "work")
    names = ("transformers fp32", "ours fp32")
    benchmark("peers.race", "prepare", *tiny, "--contestants", *names)
    out = tmp_path / "peers.json"
    settings = ("--contexts", 64, 1_000_000, "--rounds", 2, "--tokens", 3, "--prefill-tokens", 65)
    settings += ("--linear-tokens", 520, "--twin-rounds", 2)
    for asked in (["decode-fp32"], ["prefill-fp32", "linear", "twin"]):
        benchmark("peers.race", "run", *tiny, *settings, "--sections", *asked,
               "--contestants", *names, "llama.cpp f32", "--out", out)  # fmt: skip
    sections = json.loads(out.read_text())["sections"]
    added = {"decode-fp32", "prefill-fp32", "linear", "twin"}
    assert set(sections) == added, "sections are added to the file"
    rows = sections["decode-fp32"]["rows"]
    for name in names:
        assert len(rows[name]["64"]["turns_ms"]) == 2
        assert rows[name]["64"]["ms_per_token"] > 0
    assert "fit" in rows["transformers fp32"]["1000000"]["refused"]
    assert rows["ours fp32"]["1000000"]["ms_per_token"] > 0
    assert rows["llama.cpp f32"]["64"]["refused"] in ("not installed", "not prepared")
    assert sections["decode-fp32"]["floor_ms"]["ours fp32"]["64"] > 0
    assert sections["prefill-fp32"]["rows"]["ours fp32"]["tokens_per_second"] > 0
    assert sections["linear"]["rows"]["ours fp32"]["ratio"] > 0
    assert set(sections["twin"]["rows"]["ours fp32"]["ms_per_token"]) == {"4096", "1000000"}


@pytest.mark.slow
def test_batches_take_turns_and_go_on_where_they_stopped(tmp_path):
    out = tmp_path / "batches.json"
    tiny = ("--shape", "tiny", "--work", tmp_path / "work", "--rounds", 1, "--out", out)
    benchmark("decoding.batch_decoding", *tiny, "--precisions", "fp32", "--threads", 1)
    first = json.loads(out.read_text())["parts"]
    benchmark("decoding.batch_decoding", *tiny, "--precisions", "fp32", "int4", "--threads", 1)
    parts = json.loads(out.read_text())["parts"]
    assert parts["fp32, 1 thread"] == first["fp32, 1 thread"]
    for found in parts.values():
        assert [row["streams"] for row in found["rows"]] == [1, 2, 4, 8, 16]
        assert all(row["kernel"]["tokens_per_second"] > 0 for row in found["rows"])
        assert all(row["bytes_ms"] > 0 for row in found["rows"])
    # Two layers of projections and the last one, of the shape "tiny".
    assert parts["fp32, 1 thread"]["products_per_token"]["float32"] == 2 * 43008 + 512 * 64


@pytest.mark.slow
def test_a_race_without_a_gguf_file_names_what_is_missing(tmp_path):
    out = tmp_path / "race.json"
    absent = ("--gguf", tmp_path / "absent.gguf", "--fp32", tmp_path / "absent")
    benchmark("peers.gguf_race", "--work", tmp_path / "work", *absent, "--threads", 1, "--out", out)
    for found in json.loads(out.read_text())["threads"]["1"].values():
        for row in found["prefill"]["rows"].values():
            assert row["refused"] in ("not installed", "not prepared")


@pytest.mark.skipif(not INSTALLED.is_file(), reason="no kernels were built")
def test_drawing_measures_every_kind_of_sampling(tmp_path):
    out = tmp_path / "drawing.json"
    benchmark("decoding.drawing", "--vocabularies", 999, "--rounds", 2, "--out", out)
    rows = json.loads(out.read_text())["ms_a_token_by_batch_size"]
    assert all(
        row[way][b]["best"] > 0 for row in rows for way in ("numpy", "library") for b in "14"
    )


def test_snapshots_are_compared_with_plain_copies(tmp_path):
    out, bundle = tmp_path / "snapshots.json", TinyModel().write(tmp_path / "b").path
    benchmark("decoding.snapshots", bundle, "--rounds", 1, "--small", "--out", out)
    for state in json.loads(out.read_text())["states"]:
        assert state["file_bytes"] > state["bytes"] > 0
        assert len(state["times"]) == 8
        assert all(row["ms"] > 0 < row["ratio"] for row in state["times"].values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc/self/io on this system")
def test_large_export_measures_memory_traffic_and_copying(tmp_path):
    out = tmp_path / "large.json"
    benchmark("export.large_export", "--shapes", "tiny", "--work", tmp_path, "--out", out)
    (model,) = json.loads(out.read_text())["models"]
    kinds = ["float16", "float16-unchecked", "int4"]
    assert [row["export"] for row in model["exports"]] == kinds
    for row in model["exports"]:
        assert row["peak_anonymous_over_imports_bytes"] > 0
        assert row["write_bytes"] >= row["bundle_bytes"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["large.json"], "it deletes what it wrote"
    small = ("--shapes", "tiny", "--exports", "int4", "--work", tmp_path, "--out", out)
    benchmark("export.large_export", *small)
    (model,) = json.loads(out.read_text())["models"]
    assert [row["export"] for row in model["exports"]] == kinds, "others stay"


@pytest.mark.slow
def test_the_paper_s_experiment_runs_on_a_cpu(tmp_path):
    output = benchmark(
        "decoding.paper", "--work", tmp_path, "--device", "cpu", "--shape", "tiny",
        "--context", 257, "--window-size", 33, "--decode-tokens", 3,
    )  # fmt: skip
    found = json.loads(output.splitlines()[-1])
    assert set(found["contestants"]) == {"full", "lambda"}
    assert all(value > 0 for value in found["full_over_lambda"].values())


@pytest.mark.slow
def test_projections_are_measured_beside_the_bodies_and_onnxruntime_s_gemm(tmp_path):
    bundle = lminf_export.export(save_llama(tmp_path / "m"), tmp_path / "b", window_size=29)
    settings = ("--cold", "--positions", 5, 1000, "--rounds", 1, "--prefill", 31)
    found = json.loads(
        benchmark("kernels.projections", "--bundle", bundle.path, *settings).splitlines()[-1]
    )
    forms = {"function_body", "attention_only", "kernel"}
    assert set(found["memory"]) == set(found["prefill_tokens_per_second"]) == forms
    for row in found["decode"]:
        assert row["floor_ms"] > 0
        assert all(row[form]["times_the_floor"] > 0 for form in forms)
    nodes = found["nodes_of_a_step"]
    assert "Linear" not in nodes["attention_only"]
    if INSTALLED.is_file():
        assert "Gemm" not in nodes["kernel"]


@pytest.mark.slow
def test_int8_caches_are_timed_beside_float32_ones(tmp_path):
    out = tmp_path / "caches.json"
    tiny = ("--work", tmp_path / "work", "--shape", "tiny", "--window-size", 64)
    settings = ("--positions", 64, 1_000_000, "--batch-sizes", 2, "--rounds", 2)
    benchmark("decoding.kv_cache", "decode", *tiny, *settings, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["position"] for row in rows] == [64, 1_000_000]
    for row in rows:
        assert row["live_cache_bytes"]["int8"] < row["live_cache_bytes"]["float32"]
        assert set(row["ms_per_step"]) == {"float32", "int8"}
