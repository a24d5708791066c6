"""A bucket as a store of sessions: fsspec's S3, with moto in the place of Amazon's servers."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the runtime imports, without torch and transformers.
NEEDED = (
    "huggingface-hub", "jinja2", "ml-dtypes", "numpy", "onnxruntime", "psutil", "pydantic",
    "s3fs", "safetensors", "tokenizers", "moto[server]",
)  # fmt: skip
RUN = """
import json, os, socket, sys, threading
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
host, port = server.get_host_and_port()
os.environ |= {
    "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": f"http://{host}:{port}",
}
import boto3
boto3.client("s3").create_bucket(Bucket="sessions")

import lminf_export
from lminf_export.errors import LminfError, StaleTurnError
from lminf_export.runtime.parking.session_store import SessionStore

lm = lminf_export.load(sys.argv[1], threads=1)
state = lm.new_state(1)
lm.forward([[1, 2, 3, 4, 5]], state)
snapshot, secrets = state.snapshot(), ["0123456789abcdef" * 4]
here, there = (SessionStore("s3://sessions/of/tests", secrets) for _ in range(2))
found = {"none": here.load("a", lm) is None and here.latest("a") == 0 and not here.drop("a")}
here.save("a", 1, snapshot)
back = there.load("a", lm)
found["equal"] = back.turn == 1 and all(
    (back.snapshot.caches[name] == array).all() for name, array in snapshot.caches.items()
)
there.save("a", 2, snapshot)
try:
    here.save("a", 2, snapshot)
except StaleTurnError:
    found["stale"] = here.latest("a") == 2
results = []
def race(store, turn):
    try:
        store.save("b", turn, snapshot)
        results.append("saved")
    except StaleTurnError:
        results.append("stale")
for turn in range(1, 6):
    threads = [
        threading.Thread(target=race, args=(SessionStore("s3://sessions/of/tests", secrets), turn))
        for _ in range(4)
    ]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
found["race"] = sorted(results) == ["saved"] * 5 + ["stale"] * 15
found["dropped"] = there.drop("a") and here.load("a", lm) is None and not here.drop("a")
bucket = boto3.client("s3").list_objects_v2(Bucket="sessions")["Contents"]
found["objects"] = len(bucket) == 2 and all(o["Key"].startswith("of/tests/") for o in bucket)
try:
    SessionStore("s3://nothing/at/all", secrets).save("a", 1, snapshot)
except LminfError as error:
    found["no_bucket"] = "\\n" not in str(error)
server.stop()
try:
    here.latest("a")
except LminfError as error:
    found["unreachable"] = "\\n" not in str(error)
print(json.dumps({name: bool(value) for name, value in found.items()}))
"""


@pytest.mark.registry
@pytest.mark.timeout(900)
def test_sessions_in_a_bucket(demo_bundle, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDED], check=True)
    done = subprocess.run(
        [python, "-c", RUN, str(demo_bundle)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == dict.fromkeys(
        ("none", "equal", "stale", "race", "dropped", "objects", "no_bucket", "unreachable"), True
    )


def test_a_bucket_without_its_package_is_named_in_one_line():
    """fsspec knows of s3, but s3fs is not among what is installed here."""
    from importlib.util import find_spec

    from lminf_export.errors import ParkingError
    from lminf_export.runtime.parking.session_store import SessionStore

    if find_spec("s3fs") is not None:
        pytest.skip("s3fs is installed")
    with pytest.raises(ParkingError, match="s3fs") as caught:
        SessionStore("s3://bucket/prefix", ["0123456789abcdef" * 4])
    assert "\n" not in str(caught.value)
