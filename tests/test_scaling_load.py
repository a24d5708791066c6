"""The users that locust runs, and the report of their load: what counts as an answer."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("httpx")

from benchmarks.scaling import load_report
from lminf_export.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
EVENT = b'data: {"choices":[{"text":"a"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n'
DONE = b"data: [DONE]\n\n"


def users(monkeypatch: pytest.MonkeyPatch, **variables: object) -> ModuleType:
    """Load the users; locust, which has an environment of its own, is a stand-in."""
    locust: Any = ModuleType("locust")
    locust.FastHttpUser, locust.constant, locust.task = object, lambda seconds: seconds, lambda f: f
    monkeypatch.setitem(sys.modules, "locust", locust)
    for name, value in variables.items():
        monkeypatch.setenv(f"LMINF_LOAD_{name}", str(value))
    path = ROOT / "benchmarks" / "scaling" / "locustfile.py"
    spec = importlib.util.spec_from_file_location("locustfile_of_the_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream(*events: bytes) -> Any:
    text = io.BytesIO(b"".join(events))
    return lambda end: text.readline()


def test_an_answer_of_the_length_asked_for_is_one(monkeypatch):
    module = users(monkeypatch, NEW=7)
    first, tokens = module.read(stream(EVENT, EVENT, USAGE % 7, DONE))
    assert tokens == 7
    assert first > 0


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ((EVENT, EVENT), "ended before its last event"),
        ((), "ended before its last event"),
        ((EVENT, USAGE % 6, DONE), "6 tokens instead of 7"),
        ((EVENT, DONE), "0 tokens instead of 7"),
        ((EVENT, b'data: {"error":{"code":"shutting_down"}}\n\n'), "shutting_down"),
    ],
)
def test_what_is_torn_is_a_failure_and_ends(events, words, monkeypatch):
    module = users(monkeypatch, NEW=7)
    with pytest.raises(module.TornAnswerError, match=words):
        module.read(stream(*events))


def test_users_say_who_they_are_and_which_model_they_mean(monkeypatch, tmp_path):
    (tmp_path / "key").write_text("of-a-test\n")
    named = users(
        monkeypatch, MODEL="demo", KEY_FILE=tmp_path / "key", PROMPT=11, NEW=3, LARGEST_ID=17
    )
    asked = named.body()
    assert (asked["model"], asked["max_tokens"], len(asked["prompt"])) == ("demo", 3, 11)
    assert all(5 <= token < 17 for token in asked["prompt"])
    assert named.headers() == {"authorization": "Bearer of-a-test"}
    for name in ("MODEL", "KEY_FILE"):
        monkeypatch.delenv(f"LMINF_LOAD_{name}")
    bare = users(monkeypatch)
    assert "model" not in bare.body()
    assert bare.headers() == {}


def test_ids_are_those_that_a_small_vocabulary_has():
    class Small:
        vocab_size = 257

    assert load_report.largest_id(Small()) == 257


def test_a_kind_of_request_that_never_came_is_named():
    with pytest.raises(InputError, match="no answer came in the time given"):
        load_report.row([{"name": "headers"}], "answer")


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "scaling.parameters"}'])
def test_a_model_is_added_to_no_other_result(text, tmp_path):
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(InputError, match="is no report of this benchmark"):
        load_report.earlier(tmp_path / "out.json")


def test_what_is_no_locust_is_named_at_once():
    with pytest.raises(InputError, match="does not answer as locust does"):
        load_report.version_of(sys.executable)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rounds", 0), "rounds=0: must be at least 1"),
        (("--slots", 0), "slots=0: must be at least 1"),
        (("--seconds", "nan"), "seconds=nan: must be a finite number"),
        ((), "/missing does not exist"),
    ],
)
def test_a_load_that_cannot_be_asked_for_costs_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["load_report", "--bundle", "/missing", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        load_report.run_script(load_report.main)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


def test_the_committed_report_is_of_a_load_without_failures():
    found = json.loads((ROOT / "benchmarks" / "results" / "load_report.json").read_text())
    for name, model in found["models"].items():
        assert model["users"] > model["slots"], "no slot is idle"
        assert model["http_over_engine"] >= 0.95, name
        assert [row["failures"] for row in model["locust"].values()] == [0, 0, 0]
