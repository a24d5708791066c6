"""Without a key a server answers to its own machine, whatever a request's headers say."""

from __future__ import annotations

import asyncio

import pytest
from starlette.datastructures import Headers

from lminf_export.serve.api_errors import ApiError
from lminf_export.serve.auth import is_local, require_known_sender
from lminf_export.serve.guard import Guard
from lminf_export.serve.settings import ServeSettings

HERE, THERE = ("127.0.0.1", 5), ("192.0.2.7", 5)


def ask(host, client, **settings):
    require_known_sender(Headers({"host": host}), ServeSettings(**settings), client)


@pytest.mark.parametrize("client", [HERE, ("::1", 5), ("::ffff:127.0.0.1", 5), None])
def test_the_own_machine_is_answered(client):
    ask("localhost:8000", client)
    ask("127.0.0.1", client)


@pytest.mark.parametrize("client", [THERE, ("2001:db8::7", 5), ("::ffff:192.0.2.7", 5), ("", 0)])
def test_another_machine_is_not_answered_whatever_host_it_names(client):
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "x.localhost"):
        with pytest.raises(ApiError) as caught:
            ask(host, client)
        assert (caught.value.status, caught.value.code) == (403, "unknown_client")


def test_names_that_are_allowed_and_keys_answer_to_others():
    ask("box.lan", THERE, allow_hosts=("box.lan",))
    ask("anything", THERE, allow_hosts=("*",))
    ask("anything", THERE, api_keys=("key",))
    with pytest.raises(ApiError, match="--allow-host") as caught:
        ask("other.lan", HERE, allow_hosts=("box.lan",))
    # Readers of a configuration have no options.
    assert "allow_hosts" in caught.value.message
    with pytest.raises(ApiError, match="allow_origins"):
        require_known_sender(
            Headers({"host": "localhost", "origin": "https://evil.example"}), ServeSettings(), HERE
        )


def test_an_address_that_stands_for_another_is_that_one():
    assert is_local("::ffff:127.0.0.1")
    assert not is_local("::ffff:192.0.2.7")


class Counts:
    """As little of a server as the gate needs."""

    def __init__(self):
        self.settings, self.num_requests, self.metrics = ServeSettings(), 0, self

    def answered(self, *_):
        pass


@pytest.mark.parametrize(("client", "status"), [(HERE, 200), (THERE, 403)])
def test_the_gate_asks_who_sends(client, status):
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run():
        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "GET", "path": "/healthz", "client": client,
            "headers": [(b"host", b"localhost")],
        }  # fmt: skip
        gate = Guard(answer, Counts(), label=str, is_page=lambda _: False)
        await gate(scope, None, send)
        return sent[0]["status"]

    assert asyncio.run(run()) == status
