"""The openai SDK, langchain and curl get what the model writes alone."""

from __future__ import annotations

import shutil
import subprocess

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI as LangchainOpenAI

from tests.support import serving
from tests.support.serving import NAME, events, offline_answer, offline_text

PROMPT = "It is a truth"
CHAT = [{"role": "user", "content": "Tell me of Elizabeth."}]


@pytest.fixture(scope="module")
def server(demo_lm):
    with serving.server_thread(demo_lm, slots=4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_the_offline_text(client, demo_lm):
    found = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=40, temperature=0)
    assert found.choices[0].text == offline_text(demo_lm, PROMPT, 40)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(demo_lm.codec.encode(PROMPT))
    assert found.usage.completion_tokens == 40


def test_prompts_of_every_kind(client, demo_lm):
    texts = [PROMPT, "Call me"]
    ids = [demo_lm.codec.encode(text) for text in texts]
    wanted = [offline_text(demo_lm, text, 12) for text in texts]
    for prompt, expected in ((texts, wanted), (ids, wanted), (ids[0], wanted[:1])):
        found = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0)
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == list(range(len(expected)))


def test_a_streamed_completion_is_the_offline_text(client, demo_lm):
    chunks = list(
        client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=40, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks[:-1]) == offline_text(demo_lm, PROMPT, 40)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_is_the_offline_answer_streamed_or_not(client, demo_lm):
    expected = offline_answer(demo_lm, CHAT, 30)
    whole = client.chat.completions.create(
        model=NAME, messages=CHAT, max_completion_tokens=30, temperature=0
    )
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=30, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_never_shows(client, demo_lm, stream):
    text = offline_text(demo_lm, PROMPT, 60)
    stop = text[20:26]
    found = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=60, temperature=0, stop=[stop, "\0"], stream=stream
    )
    if stream:
        chunks = list(found)
        written, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0]
        reason = reason.finish_reason
    else:
        written, reason = found.choices[0].text, found.choices[0].finish_reason
    assert written == offline_text(demo_lm, PROMPT, 60, stop=(stop,)) == text[: text.index(stop)]
    assert reason == "stop"


def test_n_choices_draw_with_seeds_of_their_own(client):
    def drawn(**more):
        found = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=12, n=4, seed=3, stop=["zzzz"], **more
        )
        return [choice.text for choice in found.choices]

    assert drawn() == drawn()
    assert len(set(drawn())) > 1
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=12, n=4, seed=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == drawn()
    assert drawn(extra_body={"top_k": 1})[0] == drawn(temperature=0)[0]


def test_choices_that_a_stop_string_ends_count_what_they_wrote(client):
    def asked(seed, n):
        return client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=60, n=n, seed=seed, stop=["e", ","]
        )

    alone = [asked(3 + number, 1) for number in range(4)]
    together = asked(3, 4)
    assert [c.text for c in together.choices] == [one.choices[0].text for one in alone]
    counts = [one.usage.completion_tokens for one in alone]
    assert together.usage.completion_tokens == sum(counts)
    assert max(counts) < 60


def test_log_probabilities_stand_beside_their_tokens(client, demo_lm):
    found = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3
    ).choices[0]
    listed = found.logprobs
    assert "".join(listed.tokens) == found.text
    for token, offset, top, logprob in zip(
        listed.tokens, listed.text_offset, listed.top_logprobs, listed.token_logprobs, strict=True
    ):
        assert found.text[offset:].startswith(token)
        assert len(top) == 3
        assert top[token] == max(top.values()) == logprob <= 0
    whole = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    content = whole.logprobs.content
    assert b"".join(bytes(e.bytes) for e in content).decode() == whole.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    streamed = [
        entry
        for chunk in client.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=12, temperature=0, logprobs=True, stream=True
        )
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [e.token for e in streamed] == [e.token for e in content]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in content], abs=1e-4)


def test_errors_are_those_of_the_sdk(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    for unsupported in (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"response_format": {"type": "json_object"}},
        {"functions": [{"name": "f", "parameters": {}}]},
        {"audio": {"voice": "alloy", "format": "wav"}},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=CHAT, **unsupported)
        assert caught.value.param == next(iter(unsupported))
        assert caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="a", temperature=9)
    assert caught.value.param == "temperature"


def test_langchain_chats_and_streams(server, demo_lm):
    url = f"{server.url}/v1"
    model = ChatOpenAI(base_url=url, api_key="none", model=NAME, temperature=0, max_tokens=20)
    expected = offline_answer(demo_lm, CHAT, 20)
    assert model.invoke([("user", CHAT[0]["content"])]).content == expected
    pieces = [str(piece.content) for piece in model.stream([("user", CHAT[0]["content"])])]
    assert "".join(pieces) == expected
    assert len(pieces) > 2
    text = LangchainOpenAI(
        base_url=url, api_key="none", model=NAME, temperature=0, max_tokens=20
    ).invoke(PROMPT)
    assert text == offline_text(demo_lm, PROMPT, 20)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_a_stream_to_its_end(server, demo_lm):
    body = '{"prompt": "It is a truth", "max_tokens": 25, "temperature": 0, "stream": true}'
    found = subprocess.run(
        ["curl", "-sN", f"{server.url}/v1/completions", "-d", body],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert found.stdout.endswith(b"data: [DONE]\n\n")
    *chunks, done = events(iter(found.stdout.decode().splitlines()))
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == offline_text(demo_lm, PROMPT, 25)


def test_text_to_tokens_and_back(server, demo_lm):
    text = "Grüße, 世界 🙂"
    found = serving.post(server.url, "/tokenize", text=text).json()
    assert found["ids"] == demo_lm.codec.ids(text, add_special_tokens=True)
    assert found["count"] == len(found["ids"])
    back = serving.post(server.url, "/detokenize", ids=found["ids"]).json()
    assert back["text"] == text
    rendered = serving.post(server.url, "/tokenize", messages=CHAT).json()
    usage = serving.post(server.url, "/v1/chat/completions", messages=CHAT, max_tokens=1).json()[
        "usage"
    ]
    assert rendered["count"] == usage["prompt_tokens"]


def test_health_and_metrics(server):
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    before = httpx.get(f"{server.url}/metrics").text
    serving.post(server.url, "/v1/completions", prompt=PROMPT, max_tokens=7)
    after = httpx.get(f"{server.url}/metrics").text

    def value(text, name):
        return float(next(x for x in text.splitlines() if x.startswith(name)).split()[-1])

    name = f'lminf_new_tokens_total{{model="{NAME}"}}'
    assert value(after, name) - value(before, name) <= 7
    for series in (
        "lminf_slots", "lminf_slots_busy", "lminf_queue_length", "lminf_cache_bytes",
        "lminf_time_to_first_token_seconds_count", "lminf_inter_token_seconds_count",
        "lminf_kept_bytes", "lminf_requests_total", "lminf_prompt_tokens_total",
    ):  # fmt: skip
        assert f"\n{series}" in after
    assert value(after, f'lminf_slots{{model="{NAME}"}}') == 4
