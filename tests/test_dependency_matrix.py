"""Bounds of dependencies are what was tested, and are raised by a test only."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.evaluation import families
from scripts.checks import dependency_matrix, overlays, raise_caps

EXACT = {"stock": 1e-7, "oracle": 2e-7}


def lane(**rows: dict[str, object]) -> dict[str, object]:
    return {"versions": {"transformers": "9.9.9"}, "rows": rows}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of pyproject.toml, and a registry that serves version 99.1.2 of everything."""
    copy = tmp_path / "pyproject.toml"
    shutil.copy(overlays.PYPROJECT, copy)
    for module in (overlays, raise_caps):
        monkeypatch.setattr(module, "PYPROJECT", copy)
    monkeypatch.setattr(raise_caps, "newest", lambda package: "99.1.2")
    return copy


@pytest.mark.parametrize("package", raise_caps.PACKAGES)
def test_every_package_that_can_break_a_family_has_both_bounds(package):
    low, cap = overlays.bounds(package)
    assert re.fullmatch(r"[\d.]+", low)
    assert cap is not None
    assert re.fullmatch(r"\d+\.\d+", cap)


def test_a_bound_is_raised_after_every_family_was_exact(project, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        raise_caps, "run_lane", lambda wanted, *_: (seen.append(wanted), lane(llama=EXACT))[1]
    )
    low, _ = overlays.bounds("transformers")
    others = {name: overlays.bounds(name) for name in raise_caps.PACKAGES[1:]}
    assert raise_caps.raise_cap("transformers") == 0
    assert seen == [["transformers==99.1.2"]]
    assert overlays.bounds("transformers") == (low, "99.2")
    assert {name: overlays.bounds(name) for name in raise_caps.PACKAGES[1:]} == others
    assert raise_caps.raise_cap("transformers") == 0  # within the bound now: nothing is run
    assert len(seen) == 1
    assert "99.1.2" in capsys.readouterr().out


FAILING = (
    {"error": "AttributeError: gone"},
    {"stock": 1e-7, "oracle": 1e-4},
    {"stock": 1e-7, "oracle": float("nan")},
)


@pytest.mark.parametrize("row", FAILING, ids=["an error", "inexact", "no number"])
def test_a_bound_stays_where_a_family_fails(row, project, monkeypatch, capsys):
    monkeypatch.setattr(raise_caps, "run_lane", lambda *_: lane(llama=EXACT, gptj=row))
    before = project.read_text()
    assert raise_caps.raise_cap("transformers") == 1
    assert project.read_text() == before
    assert "gptj" in capsys.readouterr().out


def test_no_rows_are_no_success(capsys):
    assert dependency_matrix.report("lowest", lane()) == 1


def test_a_registry_that_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SystemExit, match="registry"):
        overlays.newest("transformers")


def test_an_overlay_that_cannot_be_installed_is_an_error(tmp_path, monkeypatch):
    real = subprocess.run

    def no_pip(command, **settings):
        if "install" in command:
            return SimpleNamespace(returncode=1)
        return real(command, **settings)

    monkeypatch.setattr(overlays.subprocess, "run", no_pip)
    with pytest.raises(SystemExit, match=r"could not install transformers==0\.0\.1"):
        overlays.make_overlay(tmp_path / "env", ["transformers==0.0.1"])


def test_an_overlay_sees_the_running_environment(tmp_path, monkeypatch):
    real = subprocess.run
    installed = []

    def no_network(command, **settings):
        if "install" in command:
            installed.append(command)
            return SimpleNamespace(returncode=0)
        return real(command, **settings)

    monkeypatch.setattr(overlays.subprocess, "run", no_network)
    python = overlays.make_overlay(tmp_path / "env", ["transformers==0.0.1"])
    code = "import sys, numpy; print(sys.prefix, numpy.__file__)"
    prefix, numpy = real([python, "-c", code], capture_output=True, text=True).stdout.split()
    assert prefix == str(tmp_path / "env")
    assert numpy.startswith(sys.prefix)
    overlays.make_overlay(tmp_path / "env", ["transformers==0.0.1"])
    assert len(installed) == 1


def test_the_kept_results_cover_every_family_and_are_exact():
    results = json.loads(dependency_matrix.RESULTS.read_text())
    lanes = results["lanes"]
    assert {"pinned", "transformers-lowest", "transformers-newest"} <= set(lanes)
    for name, result in lanes.items():
        assert set(result["rows"]) == set(families.jobs()), name
        assert dependency_matrix.failures(result) == {}, name


def test_the_bounds_are_those_of_the_kept_results():
    lanes = json.loads(dependency_matrix.RESULTS.read_text())["lanes"].values()
    for package in ("transformers", "onnxruntime", "torch"):
        tested = {
            overlays.numbers(result["versions"][package].partition("+")[0]) for result in lanes
        }
        low, cap = overlays.bounds(package)
        assert cap is not None
        count = len(overlays.numbers(low))
        assert min(tested)[:count] == overlays.numbers(low), package
        assert raise_caps.next_minor(".".join(map(str, max(tested)))) == cap, package
