"""The npm package `openai` against a real server, in the node that playwright brings.

The package is fetched once, by `make test-versions`; from then on `make test` runs this, too.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.npm_packages import NpmPackage, node
from tests.support.serving import (
    NAME,
    offline_answer,
    offline_text,
    server_process,
    wait_until,
)

OPENAI = NpmPackage(
    "openai",
    "7.59.0",
    "wPYKJkLPFEdNJ2tThSg4jE1Ptsv4X3u8g8LIvu0Qz/UIhsKeCzl73rl48PtQsDVrJL/ku0liXOsbyd2TsRsPJw==",
)
SCRIPT = Path(__file__).parent / "support" / "openai_client.mjs"
KEY = "a-key-for-tests"
ASKED = [{"role": "user", "content": "Tell me of Elizabeth."}]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(node() is None, reason="needs playwright")]
if not OPENAI.kept.is_dir():
    pytestmark.append(pytest.mark.registry)


@pytest.fixture(scope="module")
def found(demo_bundle, tmp_path_factory) -> dict[str, Any]:
    """What the client printed, and what it left in the server's slots."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "node_modules").mkdir()
    (folder / "node_modules" / "openai").symlink_to(OPENAI.fetch())
    # Modules are looked for beside the real file, so it is a copy.
    script = folder / SCRIPT.name
    script.write_text(SCRIPT.read_text())
    with server_process(demo_bundle, "--slots", "2", LMINF_API_KEY=KEY) as server:
        run = subprocess.run(
            [str(node()), str(script), f"{server.url}/v1", KEY, NAME],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        headers = {"authorization": f"Bearer {KEY}"}

        def all_slots_are_free() -> bool:
            shown = httpx.get(f"{server.url}/metrics", headers=headers).text
            return f'lminf_slots_busy{{model="{NAME}"}} 0.0' in shown

        wait_until(all_slots_are_free)
    return json.loads(run.stdout)


def test_answers_are_the_models_own_in_one_piece_and_streamed(found, demo_lm):
    expected = offline_answer(demo_lm, ASKED, 30)
    assert found["models"] == [NAME]
    assert found["plain"]["choices"][0]["message"]["content"] == expected
    assert found["streamed"]["text"] == expected
    assert found["streamed"]["usage"]["completion_tokens"] == 30
    assert found["streamed"]["chunks"] > 3
    assert found["completion"] == offline_text(demo_lm, "It is a truth", 30)


def test_a_gathered_stream_has_its_log_probabilities(found, demo_lm):
    choice = found["gathered"]
    assert choice["message"]["content"] == offline_answer(demo_lm, ASKED, 30)
    assert choice["finish_reason"] == "length"
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 30
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode().strip() == (
        choice["message"]["content"].strip()
    )


def test_a_session_goes_on(found, demo_lm):
    first, second = found["turns"]
    asked = [*ASKED, {"role": "assistant", "content": first}]
    asked.append({"role": "user", "content": "And of Jane?"})
    assert first == offline_answer(demo_lm, ASKED, 30)
    assert second == offline_answer(demo_lm, asked, 30)


def test_refusals_become_the_clients_own_errors(found):
    refusals = found["refusals"]
    assert [(name, refusal["class"], refusal["status"]) for name, refusal in refusals.items()] == [
        ("model", "NotFoundError", 404),
        ("format", "BadRequestError", 400),
        ("key", "AuthenticationError", 401),
        ("streamed", "BadRequestError", 400),
    ]
    assert refusals["model"]["code"] == "model_not_found"
    assert refusals["format"]["param"] == "response_format"
    assert "temperature" in refusals["streamed"]["message"]
