"""A plan that is named is what runs; where it cannot, nothing else is measured in its place."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from lminf_export import SessionError
from lminf_export.cli.main import cli
from lminf_export.evaluate.perplexity import evaluate_perplexity
from lminf_export.runtime import tensorrt
from lminf_export.verify.validate import validate
from tests.support.tensorrt_doubles import bundle_with_plan

COMMANDS = {
    "generate": ["--prompt", "a"],
    "validate": [],
    "validate text": ["--text", "TEXT"],
    "bench": [],
    "eval perplexity": ["--text", "TEXT"],
    "eval passkey": ["--lengths", "64"],
    "eval lookup": ["--lengths", "64"],
    "eval generate": [],
}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: "no driver")
    bundle, _ = bundle_with_plan(tmp_path)
    return bundle.path / "engine.plan"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_the_plan_or_nothing(command, plan, tmp_path):
    (tmp_path / "text").write_text("some words")
    options = [str(tmp_path / "text") if x == "TEXT" else x for x in COMMANDS[command]]
    words = command.removesuffix(" text").split()
    result = CliRunner().invoke(cli, [*words, str(plan), *options])
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    assert "GPU" in line or "tokenizer" in line


def test_functions_run_the_plan_or_nothing(plan, tmp_path):
    (tmp_path / "text").write_text("some words")
    with pytest.raises(SessionError, match="needs an NVIDIA GPU"):
        validate(plan)
    with pytest.raises(SessionError, match="needs an NVIDIA GPU"):
        evaluate_perplexity(plan, [str(tmp_path / "text")])
