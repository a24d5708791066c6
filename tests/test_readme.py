"""The README's Python runs, and does what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S
)


def test_the_readme_has_python():
    assert SNIPPETS


@pytest.mark.slow
def test_its_python_runs_on_the_demo_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    logits, state = names["logits"], names["state"]
    assert logits.dtype == np.float32
    assert logits.shape == (1, 3, names["model"].vocab_size)
    # Three tokens by forward, then the prompt of one and all that was written but the last.
    assert state.past_length.tolist() == [3 + 1 + 999]
    assert 0 < state.nbytes <= state.max_nbytes
    assert capsys.readouterr().out.strip()
