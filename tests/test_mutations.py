"""Damaged files end in one line: some hundred of the mutants of scripts.checks.mutations."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support.mutations import mutate_bytes, mutate_gguf, mutate_json, mutate_safetensors

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutations.json"


@pytest.mark.slow
def test_nothing_but_our_errors_leaves_what_reads_damaged_files(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "scripts.checks.mutations", "--count", "240", "--each", "2"]
    done = subprocess.run(
        [*command, "--seed", "7", "--out", found], cwd=ROOT, capture_output=True, text=True
    )
    report = json.loads(found.read_text())
    assert [x["escapes"] for x in report["targets"].values() if x["escapes"]] == []
    assert done.returncode == 0
    assert len(report["targets"]) == 11
    for counts in report["targets"].values():
        assert sum(counts["outcomes"].values()) > 0
    assert report["targets"]["config.json"]["outcomes"]["refused"] > 20


def test_the_committed_run_is_of_ten_thousand_and_none_escaped():
    report = json.loads(RESULT.read_text())
    assert report["mutants"] >= 10_000
    assert report["escaped"] == 0


def test_a_mutant_is_the_same_for_the_same_seed_and_the_original_is_kept():
    content = {"a": [1, {"b": None}], "c": "text", "d": {"e": 0.5}}
    before = json.dumps(content)
    for seed in range(200):
        first, second = (mutate_json(content, random.Random(seed)) for _ in range(2))
        assert json.dumps(first) == json.dumps(second)
    assert json.dumps(content) == before


def test_bytes_and_headers_are_changed():
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    raw = len(header).to_bytes(8, "little") + header + bytes(4)
    for change in (mutate_bytes, mutate_gguf, mutate_safetensors):
        mutants = [change(raw, random.Random(seed)) for seed in range(50)]
        assert sum(mutant != raw for mutant in mutants) > 40
