"""docs/chat.md prints what its commands print, and names options that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lminf_export.cli.chat import chat_command
from lminf_export.cli.chat_loop import COMMANDS
from lminf_export.cli.generate import generate_command
from lminf_export.runtime.chat.process import (
    MOST_BYTES,
    MOST_SECONDS,
    MOST_TEMPLATE_CHARACTERS,
    MOST_TEXT_CHARACTERS,
)
from lminf_export.runtime.following import MOST_LINE_BYTES, WRITE_AFTER
from scripts.docs import record_chat

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "chat.md").read_text(encoding="utf-8")
PROSE = re.sub(r"(?s)```.*?```", "", PAGE)


@pytest.mark.slow
def test_the_commands_print_what_the_page_shows(demo_bundle, tmp_path):
    assert not record_chat.differences(record_chat.recorded(tmp_path, demo_bundle))


def test_the_page_names_options_and_commands_that_there_are():
    commands = (*chat_command.params, *generate_command.params)
    options = {option for parameter in commands for option in parameter.opts}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PROSE))
    assert not shown - options - {"--model", "--out"}
    assert set(re.findall(r"`/([a-z]+)", PROSE)) == set(COMMANDS)
    assert all(f"| `{mode}`" in PROSE for mode in WRITE_AFTER)


def test_the_page_names_the_bounds_that_hold():
    assert (MOST_TEMPLATE_CHARACTERS, MOST_TEXT_CHARACTERS) == (2**20, 2**24)
    assert (MOST_SECONDS, MOST_BYTES, MOST_LINE_BYTES) == (2, 2**30, 65_536)
    for bound in ("2²⁰ characters", "2²⁴ characters", "| 2 s |", "| 1 GiB |", "65,536 bytes"):
        assert bound in PROSE


def test_the_python_of_the_page_runs(demo_bundle, tmp_path, monkeypatch, capsys):
    (tmp_path / "demo").symlink_to(demo_bundle)
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(compile(code, "docs/chat.md", "exec"), {})
    assert capsys.readouterr().out
