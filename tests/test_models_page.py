"""The results behind docs/models.md are whole, and engines of every kind of position are built."""

from __future__ import annotations

import json

import pytest

from benchmarks.evaluation import families, wrappers
from benchmarks.support import own_families as own
from benchmarks.support.families import CASES
from lminf_export import export
from lminf_export.models.wrappers import TESTED_WRAPPERS
from tests.support.rtx import RTX, needs_rtx

BY_NAME = {case.model_type: case for case in CASES}


def test_every_row_of_the_results_is_measured_and_has_an_engine_or_a_reason():
    rows = json.loads(families.RESULTS.read_text())["rows"]
    assert set(rows) == set(families.jobs()) == {*BY_NAME, *own.CASES}
    assert all(0 < row["stock"] < 2e-5 and 0 < row["oracle"] < 2e-5 for row in rows.values())
    assert all(row["engine"] for row in rows.values())


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gemma3_text", id="two rotations and sliding layers"),
        pytest.param("falcon-rw", id="ALiBi"),
        pytest.param("gpt_oss", id="experts and learned sink logits"),
    ],
)
def test_an_engine_of_every_kind_is_built_on_a_cpu(name, tmp_path):
    folder = tmp_path / "m"
    source = BY_NAME[name].save(folder) if name in BY_NAME else own.save(name, folder)
    out = tmp_path / "b" / "engine.plan"
    bundle = export(source, out, builder=RTX, window_size=32, chunk_size=16)
    assert bundle.manifest.engine.builder == RTX
    assert bundle.plan_path.stat().st_size > 0


def test_every_multimodal_type_is_exact_or_has_a_reason():
    rows = json.loads(wrappers.RESULTS.read_text())["rows"]
    exact = {name for name, row in rows.items() if "errors" in row}
    assert exact == set(TESTED_WRAPPERS)
    assert all(max(rows[name]["errors"].values()) < 2e-5 for name in exact)
    assert all(rows[name].get("reason") or rows[name]["text"] for name in rows.keys() - exact)
