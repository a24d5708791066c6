"""Several models in one server; one of bytes, whose text breaks anywhere; one that ends."""

from __future__ import annotations

import httpx
import pytest

import lminf_export
from tests.support import serving
from tests.support.serving import NAME, events, post
from tests.support.tiny_bundle import TinyModel

COMPLETIONS = "/v1/completions"
PROMPT = "Grüße 🙂"


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory):
    return lminf_export.load(TinyModel().write(tmp_path_factory.mktemp("tiny") / "b").path)


@pytest.fixture(scope="module")
def ending_lm(tiny_lm, tmp_path_factory):
    """The same model, one of whose tokens ends the text."""
    ids = tiny_lm.codec.encode(PROMPT)
    written = list(tiny_lm.generate(ids, max_new_tokens=30))
    end = next(t for place, t in enumerate(written) if place > 5 and t not in written[:place])
    folder = tmp_path_factory.mktemp("ending") / "b"
    return lminf_export.load(TinyModel(eos_token_ids=(end,)).write(folder).path)


@pytest.fixture(scope="module")
def server(demo_lm, tiny_lm, ending_lm):
    with serving.server_thread(demo_lm, {"tiny": tiny_lm, "ending": ending_lm}) as server:
        yield server


def streamed(url, **body):
    body = {"temperature": 0, "stream": True, "prompt": PROMPT, **body}
    with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=60) as response:
        assert response.status_code == 200
        *chunks, done = events(response.iter_lines())
    assert done == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    return text, chunks[-1]["choices"][0]["finish_reason"]


def test_each_model_answers_by_its_name(server, demo_lm, tiny_lm):
    names = [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]]
    assert names == [NAME, "tiny", "ending"]
    for name, lm in ((NAME, demo_lm), ("tiny", tiny_lm)):
        found = post(
            server.url, COMPLETIONS, model=name, prompt=PROMPT, max_tokens=20, temperature=0
        )
        assert found.json()["choices"][0]["text"] == serving.offline_text(lm, PROMPT, 20)
        assert found.json()["model"] == name
    unnamed = post(server.url, COMPLETIONS, prompt=PROMPT)
    assert unnamed.status_code == 400
    assert unnamed.json()["error"]["param"] == "model"
    assert post(server.url, "/tokenize", model="tiny", text=PROMPT).json()["count"] == 12


def test_bytes_that_are_no_text_come_as_they_do_offline(server, tiny_lm):
    expected = serving.offline_text(tiny_lm, PROMPT, 60)
    assert "\ufffd" in expected
    assert streamed(server.url, model="tiny", max_tokens=60) == (expected, "length")
    whole = post(
        server.url, COMPLETIONS, model="tiny", prompt=PROMPT, max_tokens=60, temperature=0,
        logprobs=2,
    ).json()["choices"][0]  # fmt: skip
    assert whole["text"] == expected
    assert len(whole["logprobs"]["tokens"]) == 60
    assert any(token.startswith("bytes:\\x") for token in whole["logprobs"]["tokens"])


def test_a_text_ends_where_the_model_ends_it(server, tiny_lm, ending_lm):
    expected = serving.offline_text(ending_lm, PROMPT, 60)
    assert serving.offline_text(tiny_lm, PROMPT, 60).startswith(expected[:-1])
    assert streamed(server.url, model="ending", max_tokens=60) == (expected, "stop")
    on, reason = streamed(server.url, model="ending", max_tokens=60, ignore_eos=True)
    assert (on, reason) == (serving.offline_text(tiny_lm, PROMPT, 60), "length")


def test_a_conversation_goes_on_behind_an_end(server, tiny_lm, ending_lm):
    """What ended an answer is no part of the text that goes on."""
    head = {"x-session-id": "ending"}
    codec = tiny_lm.codec
    ids = codec.encode(PROMPT)
    written = list(ending_lm.generate(ids, max_new_tokens=60))
    more = codec.ids(" and")
    expected = list(tiny_lm.generate([*ids, *written, *more], max_new_tokens=10))
    body = {"model": "ending", "temperature": 0, "max_tokens": 60}
    first = httpx.post(server.url + COMPLETIONS, json={**body, "prompt": PROMPT}, headers=head)
    assert first.json()["choices"][0]["finish_reason"] == "stop"
    body = {**body, "prompt": " and", "max_tokens": 10, "ignore_eos": True, "logprobs": 0}
    second = httpx.post(server.url + COMPLETIONS, json=body, headers=head).json()
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(ids) + len(written)
    assert usage["prompt_tokens"] == len(ids) + len(written) + len(more)
    assert second["choices"][0]["text"] == "".join(
        codec.stream(expected, after=[*ids, *written, *more])
    )
