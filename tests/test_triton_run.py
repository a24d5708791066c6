"""A real tritonserver, out of its wheel, serves the demo bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.registry
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] > (3, 13), reason="the wheel is of Linux"
)
def test_triton_serves_a_bundle_as_it_is(demo_bundle, tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.scaling.triton_run", "--bundle", str(demo_bundle),
        "--work", str(tmp_path), "--rounds", "0", "--tokens", "64",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["configs"] == {"onnxruntime": True, "tensorrt": True}
    assert all(found["parameters"]["equal"].values())
    assert all(found["parameters"]["errors"].values())
    assert "unexpected shape" in found["unloading"]["error"]
    assert found["unloading"]["behind_it"]
    assert found["streams"]["equal_to_offline"] == found["streams"]["clients"] == 8
    assert found["sessions"]["text_in_three_requests_equal"]
    assert found["sessions"]["start_begins_anew"]
    assert found["sessions"]["end_answers"]
    assert all(found["sessions"]["errors"].values())
    assert found["departure"]["free_after_s"] < 5
    assert found["example"]["text_equal"]
    assert found["restart"]["text_equal"]
