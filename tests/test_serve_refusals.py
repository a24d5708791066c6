"""What a server refuses: every odd body with an error object, and none ends it."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import random
import socket
import string
import threading
import time

import httpx
import pytest

from lminf_export.serve.api_errors import ApiError
from lminf_export.serve.openai_schema import CompletionFields, read_fields
from tests.support import serving
from tests.support.serving import CHAT, COMPLETIONS, offline_text, post, wait_until

LIMITS = {
    "slots": 2,
    "max_waiting": 2,
    "max_body_bytes": 65536,
    "max_prompt_tokens": 300,
    "max_new_tokens": 100_000,
    "max_choices": 6,
    "body_seconds": 1.5,
    "header_seconds": 1.5,
    "write_seconds": 1.5,
}
ODD = [
    None, True, False, 0, -1, 1, 3.5, 1e308, -1e308, 10**400, 2**63, -(2**63), "", "x", "1",
    "\x00", "\ud800", "\udfff x", "🙂" * 50, [], [None], [[]], [[[]]], {}, {"a": 1}, [True],
    ["a", 1], [1, "a"], [-1], [4096], [10**30], [1.5], [{}], {"type": "json_object"}, "a" * 5000,
    list(range(500)), [["a"]], {"type": "text", "x": 1}, [[1], ["a"]], {"-1": 5}, {"7": 500},
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "n", "stream", "stream_options", "stop", "seed", "presence_penalty", "frequency_penalty",
    "logit_bias", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos",
    "logprobs", "top_logprobs", "best_of", "echo", "suffix", "response_format", "tools",
    "tool_choice", "functions", "function_call", "audio", "modalities", "prediction", "unknown",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(demo_lm):
    with serving.server_thread(demo_lm, **LIMITS) as server:
        yield server


def require_error(response: httpx.Response, status: int | None = None) -> dict:
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    if status is not None:
        assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 400
    return error


def odd_bodies(count: int):
    """Yield a path and a body with one to three odd fields, or no JSON at all."""
    chosen = random.Random(16)
    for number in range(count):
        path = (COMPLETIONS, CHAT, "/tokenize", "/detokenize")[number % 4 if number % 3 else 0]
        body: dict = {"max_tokens": 2}
        if path == COMPLETIONS:
            body["prompt"] = "It is"
        elif path == CHAT:
            body["messages"] = [{"role": "user", "content": "Hello"}]
        for name in chosen.sample(FIELDS, chosen.randint(1, 3)):
            body[name] = chosen.choice(ODD)
        if path == CHAT and chosen.random() < 0.3:
            message = {"role": chosen.choice(["user", "tool", 3, None]), "content": "a"}
            message[chosen.choice(["content", "role", "tool_calls"])] = chosen.choice(ODD)
            body["messages"] = [message]
        text = json.dumps(body)
        kind = chosen.random()
        if kind < 0.1:
            text = text[: chosen.randrange(len(text))]
        elif kind < 0.15:
            place = chosen.randrange(len(text))
            text = text[:place] + chosen.choice(string.printable) + text[place + 1 :]
        yield path, text.encode()


@pytest.mark.slow
def test_a_thousand_odd_bodies_get_an_error_or_an_answer(server):
    refused = 0
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, body in odd_bodies(1200):
            response = client.post(path, content=body)
            if response.status_code != 200:
                require_error(response)
                refused += 1
    assert refused > 1000
    wait_until(lambda: server.stats().active == 0)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"x"', b"{", b"\xff", b"\xef\xbb\xbf{}", b'{"prompt": NaN}',
        b"[" * 100_00, b'{"a":' * 5000, b'{"prompt":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "{}".encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(server, body):
    require_error(httpx.post(server.url + COMPLETIONS, content=body), 400)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "a " * 2000}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 200_000}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "n": 7}, "n"),
        (COMPLETIONS, {"prompt": ["a"] * 4, "n": 2}, "n"),
        (COMPLETIONS, {"prompt": "a", "stop": ["s"] * 17}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": "s" * 1025}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "echo"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options"),
        (COMPLETIONS, {"prompt": [0, 4096]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"4096": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"05": 1, "5": 2}}, "logit_bias"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "bogus": 0}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages",
        ),
        (COMPLETIONS, {"prompt": "a", "max_token": 1}, "max_token"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_the_error_names_the_field(server, path, body, param):
    assert require_error(post(server.url, path, **body), 400)["param"] == param


def test_what_clients_send_and_nobody_needs_is_accepted(server):
    found = post(
        server.url, CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        max_tokens=1, user="me", store=False, metadata={"a": "b"}, service_tier="auto",
        parallel_tool_calls=True, tools=[], response_format={"type": "text"}, n=1,
    )  # fmt: skip
    assert found.status_code == 200, found.text


@pytest.mark.parametrize(
    "headers",
    [
        [("x-session-id", "a"), ("x-session-must-exist", "on")],
        [("x-session-id", "a"), ("x-session-must-exist", "1, 1")],
        [("x-session-id", "a"), ("x-session-must-exist", "1"), ("x-session-must-exist", "0")],
        [("x-session-must-exist", "1")],
    ],
)
def test_a_header_that_must_not_be_misunderstood_is_refused(server, headers):
    found = httpx.post(server.url + COMPLETIONS, json={"prompt": "a"}, headers=headers)
    assert require_error(found, 400)["param"] == "x-session-must-exist"


def test_a_name_that_stands_twice_is_refused(server):
    body = b'{"prompt": "a", "max_tokens": 1, "prompt": "b"}'
    error = require_error(httpx.post(server.url + COMPLETIONS, content=body), 400)
    assert "a name stands in an object twice" in error["message"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/demo", "/healthz", "/readyz", "/metrics", "/v1/sessions"]
)
def test_whatever_can_be_read_answers_head_too(server, path):
    found, head = httpx.get(server.url + path), httpx.head(server.url + path)
    assert (head.status_code, head.content) == (found.status_code, b"")
    assert head.headers["content-type"] == found.headers["content-type"]


def test_unknown_paths_and_methods(server):
    assert require_error(httpx.get(server.url + "/v1/none"), 404)["code"] == "unknown_url"
    assert require_error(httpx.get(server.url + COMPLETIONS), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_while_it_arrives(server, chunked):
    body = b'{"prompt": "' + b"a" * 200_000 + b'"}'
    content = iter([body[i : i + 8192] for i in range(0, len(body), 8192)]) if chunked else body
    refused = httpx.post(server.url + COMPLETIONS, content=content)
    assert require_error(refused, 413)["code"] == "body_too_large"
    assert refused.headers["connection"] == "close"


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP"])
def test_a_compressed_body_is_refused(server, encoding):
    refused = httpx.post(
        server.url + COMPLETIONS,
        content=gzip.compress(b'{"prompt": "a"}'),
        headers={"content-encoding": encoding},
    )
    assert require_error(refused, 415)["code"] == "body_encoded"
    plain = httpx.post(
        server.url + COMPLETIONS,
        content=b'{"prompt": "a", "max_tokens": 1}',
        headers={"content-encoding": "identity"},
    )
    assert plain.status_code == 200


def test_a_number_of_very_many_digits_is_refused_in_our_words(server):
    body = b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}"
    error = require_error(httpx.post(server.url + COMPLETIONS, content=body), 400)
    assert error["message"] == "the body is not JSON: a number has 5000 digits"


@pytest.mark.slow
def test_slow_bodies_and_slow_headers_are_cut_off(server):
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"
        )
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nhost: loc")
        start = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(100) == b""
        assert time.monotonic() - start < 5


def test_what_is_no_http_is_refused_and_ends_nothing(server):
    address = server.url.removeprefix("http://").split(":")
    chosen = random.Random(7)
    heads = [
        chosen.randbytes(200) + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n"
        b"content-length: 2\r\n\r\n{",
        b"GET / FTP/1.1\r\n\r\n",
    ]
    for head in heads:
        with socket.create_connection((address[0], int(address[1])), timeout=10) as client:
            client.sendall(head)
            answer = client.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 400")
            assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_http"
    assert httpx.get(server.url + "/readyz").status_code == 200


def test_large_headers_are_refused(server):
    response = httpx.get(server.url + "/healthz", headers={"x": "a" * 40_000})
    # Refused by whom reads them first, the server or its connection.
    assert response.status_code in (400, 431)


def test_a_full_queue_is_told_and_who_waits_is_served(server, demo_lm):
    statuses, texts = [], []

    def ask():
        found = post(server.url, COMPLETIONS, prompt="It is a truth", max_tokens=300, temperature=0)
        statuses.append(found.status_code)
        if found.status_code == 200:
            texts.append(found.json()["choices"][0]["text"])
        else:
            assert require_error(found, 429)["code"] == "queue_full"
            assert int(found.headers["retry-after"]) >= 1

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert set(texts) == {offline_text(demo_lm, "It is a truth", 300)}


@pytest.mark.slow
def test_a_reader_that_does_not_read_is_cut_off_and_stops_nobody(server, demo_lm):
    address = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "prompt": "It is",
            "max_tokens": 100_000,
            "stream": True,
            "ignore_eos": True,
            "logprobs": 20,
        }
    ).encode()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((address[0], int(address[1])))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}"
        lazy.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: server.stats().active == 1)
        found = post(server.url, COMPLETIONS, prompt="It is", max_tokens=20, temperature=0)
        assert found.json()["choices"][0]["text"] == offline_text(demo_lm, "It is", 20)
        wait_until(lambda: server.stats().active == 0, 40)
    assert not server.app.state.serving.running


def test_only_this_machine_and_its_own_pages_are_answered(server):
    def status(**headers):
        return httpx.get(server.url + "/v1/models", headers=headers).status_code

    assert status(host="evil.example") == 403
    assert status(host="evil.example:8000") == 403
    assert status(host="localhost:1") == status(host="[::1]:80") == status(host="127.0.0.1") == 200
    assert status(origin="http://evil.example") == 403
    assert status(origin="null") == 403
    assert status(origin=server.url) == 200
    answer = httpx.get(server.url + "/v1/models", headers={"origin": server.url})
    assert "access-control-allow-origin" not in answer.headers


def test_keys_are_asked_for_and_metrics_tell_nobody(demo_lm):
    with serving.server_thread(
        demo_lm, api_keys=("first-key", "second-key"), allow_origins=("http://a.example",)
    ) as server:

        def get(path, **headers):
            return httpx.get(server.url + path, headers=headers)

        for path in ("/v1/models", "/metrics", "/v1/sessions"):
            assert require_error(get(path), 401)["code"] == "invalid_api_key"
            for wrong in ("Bearer first-kez", "Bearer", "first-key", "Basic first-key"):
                require_error(get(path, authorization=wrong), 401)
            for key in ("first-key", "second-key"):
                assert get(path, authorization=f"Bearer {key}").status_code == 200
        # A proxy may have looked at the other one.
        for twice in (["first-key", "second-key"], ["first-key", "first-key"]):
            sent = [("authorization", f"Bearer {key}") for key in twice]
            require_error(httpx.get(server.url + "/v1/models", headers=sent), 401)
        require_error(post(server.url, COMPLETIONS, prompt="a"), 401)
        require_error(httpx.post(server.url + COMPLETIONS, content=b"\xff" * 500_000), 401)
        assert get("/healthz").status_code == get("/readyz").status_code == 200
        assert get("/healthz", host="any.example").status_code == 200
        found = get("/v1/models", authorization="Bearer first-key", origin="http://a.example")
        assert found.headers["access-control-allow-origin"] == "http://a.example"
        asked = {
            "origin": "http://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        assert httpx.options(server.url + COMPLETIONS, headers=asked).status_code == 200
        asked["origin"] = "http://b.example"
        assert httpx.options(server.url + COMPLETIONS, headers=asked).status_code == 400


def test_an_answer_ends_with_its_time(demo_lm):
    with serving.server_thread(demo_lm, slots=1, max_stream_seconds=0.5) as server:
        start = time.monotonic()
        found = post(
            server.url, COMPLETIONS, prompt="It is", max_tokens=100_000, ignore_eos=True
        ).json()
        assert time.monotonic() - start < 5
        assert found["choices"][0]["finish_reason"] == "length"
        assert 0 < found["usage"]["completion_tokens"] < 100_000
        assert server.stats().active == 0


def test_a_model_without_a_template_completes_and_does_not_chat(demo_lm):
    with serving.server_thread(demo_lm) as server:
        server.model.template = None
        error = require_error(
            post(server.url, CHAT, messages=[{"role": "user", "content": "a"}]), 400
        )
        assert error["code"] == "no_chat_template"
        assert post(server.url, COMPLETIONS, prompt="a", max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "stop": [1] * 20_000},
        {"prompt": "a", "stop_token_ids": [""] * 20_000},
        {"prompt": "a", "logit_bias": {str(n): 999 for n in range(20_000)}},
        {"prompt": "a", **{f"x{n}": 1 for n in range(20_000)}},
        {"prompt": "a", "stream_options": {f"x{n}": 1 for n in range(20_000)}},
    ],
    ids=["stop", "stop_token_ids", "logit_bias", "names", "stream_options"],
)
def test_many_wrong_items_are_refused_at_the_first(body):
    begun = time.process_time()
    with pytest.raises(ApiError) as caught:
        read_fields(CompletionFields, body)
    assert caught.value.status == 400
    assert time.process_time() - begun < 0.05  # all of them take ten times as long


def test_a_long_text_is_read_while_others_write(demo_lm):
    text = "a b" * 300_000
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=tick)
    watcher.start()
    begun = time.perf_counter()
    ids = demo_lm.codec.ids(text)
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    assert ids == demo_lm.codec.tokenizer.encode(text, add_special_tokens=False).ids
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(gaps) < max(0.5 * seconds, 0.2)


def test_a_session_that_is_named_twice_is_refused(server):
    headers = [("x-session-id", "a"), ("x-session-id", "b")]
    refused = httpx.post(server.url + COMPLETIONS, json={"prompt": "a"}, headers=headers)
    assert "more than once" in require_error(refused, 400)["message"]
