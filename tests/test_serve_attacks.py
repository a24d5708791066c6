"""What a client, or a wrong option, could do to a server that it must not."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

import httpx
import pytest

from lminf_export.errors import InputError
from lminf_export.serve.session_folder import SessionFolder
from tests.support import serving
from tests.support.serving import post

SECONDS = 0.5


@pytest.fixture(scope="module")
def server(demo_lm):
    limits = {"header_seconds": SECONDS, "max_prompt_tokens": 200}
    with serving.server_thread(demo_lm, slots=2, **limits) as server:
        yield server


def seconds_open(url: str, head: bytes, piece: bytes, most: float) -> float:
    """Return how long a server lets a client send a request's body in pieces, at most so long."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(0.05)
        connection.sendall(head)
        start = time.monotonic()
        while time.monotonic() < start + most:
            try:
                connection.sendall(piece)
                while connection.recv(65536):
                    pass
                break
            except TimeoutError:
                continue
            except OSError:
                break
        return time.monotonic() - start


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("GET /healthz", "localhost"), ("GET /", "localhost"), ("POST /v1/models", "localhost"),
        ("POST /v1/completions", "a.example"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_nobody_waits_for_holds_no_connection(server, line, host, chunked):
    """The answer has been sent, and the client goes on with its body, a byte at a time."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000"
    head = f"{line} HTTP/1.1\r\nHost: {host}\r\n{length}\r\n\r\n".encode()
    piece = b"1\r\nx\r\n" if chunked else b"x"
    assert seconds_open(server.url, head, piece, 10 * SECONDS) < 5 * SECONDS


def read_answer(answers: BinaryIO) -> bytes:
    """Return the body of the next answer."""
    length = 0
    while line := answers.readline().strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return answers.read(length)


def test_a_late_body_does_not_end_the_connection_of_a_client_that_ends_it(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(5)
        answers = connection.makefile("rb")
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(request + b"Content-Length: 4\r\n\r\n")
        assert read_answer(answers) == b'{"status":"ok"}'
        connection.sendall(b"ab")
        connection.sendall(b"cd" + request + b"\r\n")
        assert read_answer(answers) == b'{"status":"ok"}'


def test_as_much_is_tokenized_as_is_read(server):
    assert post(server.url, "/tokenize", text="word " * 150).is_success
    assert post(server.url, "/detokenize", ids=[5] * 200).is_success
    for path, body in (
        ("/tokenize", {"text": "word " * 300}),
        ("/detokenize", {"ids": [5] * 201}),
    ):
        found = post(server.url, path, **body)
        assert found.status_code == 400
        assert "200" in found.json()["error"]["message"]


def test_a_folder_of_other_things_is_left_as_it_is(tmp_path):
    """A bundle's own folder, by mistake; a project's."""
    before = {
        "lminf.json": b"{}", "package.json": b"not even JSON", "kept.state": b"x",
        "half.part": b"y", "0" * 64 + ".txt": b"z",
    }  # fmt: skip
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    tmp_path.chmod(0o755)
    SessionFolder(tmp_path, 1 << 20).close()
    (tmp_path / ".lock").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    """In a place where everybody may make one, such as /tmp."""
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(InputError, match="another user"):
        SessionFolder(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path):
    target = tmp_path / "target"
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / ".lock").symlink_to(target)
    with pytest.raises(InputError, match="session-folder"):
        SessionFolder(tmp_path / "sessions", 1 << 20)
    assert not target.exists()


@pytest.mark.parametrize("state", [".", "..", "lminf.json", "", "1" * 64 + "-00000000.state"])
def test_a_record_leads_to_no_file_but_its_own(tmp_path, state):
    """Whatever a record says, what it names is neither read nor removed."""
    other = tmp_path / ("1" * 64 + "-00000000.state")
    for path in (tmp_path / "lminf.json", other):
        path.write_bytes(b"content")
    size = (tmp_path / state).stat().st_size
    record = tmp_path / ("0" * 64 + ".json")
    record.write_text(json.dumps({"format": 1, "state": state, "bytes": size}))
    folder = SessionFolder(tmp_path, 1 << 20)
    assert folder.counts() == (1, 0)
    assert folder.drop(record.stem)
    folder.close()
    assert not record.exists()
    assert (tmp_path / "lminf.json").read_bytes() == b"content"


def test_nothing_of_this_machine_is_in_what_clients_are_told(server, demo_bundle):
    """No path of the bundle, of the package, or of a user's home."""
    asked = [
        post(server.url, "/v1/chat/completions", messages=[{"role": "user", "content": 5}]),
        post(server.url, "/v1/completions", prompt="a", model=str(demo_bundle)),
        post(server.url, "/v1/completions", prompt=[99999999]),
        post(server.url, "/v1/completions", prompt="a", stop=[""]),
        httpx.get(server.url + "/../../etc/passwd"),
        httpx.get(server.url + "/..%2f..%2flminf.json"),
        httpx.get(server.url + "/page/app.js"),
        httpx.get(server.url + "/v1/models/..%2f" + demo_bundle.name),
        httpx.get(server.url + "/v1/models"),
        httpx.get(server.url + "/metrics"),
        httpx.delete(server.url + "/v1/sessions/..%2f..%2fx"),
    ]
    hidden = (str(demo_bundle.parent), str(Path(__file__).parents[1]), str(Path.home()))
    for answer in asked:
        given = answer.request.content.decode() + str(answer.request.url)
        for words in hidden:
            assert words not in answer.text or words in given, answer.text
    assert all(answer.status_code in (400, 404) for answer in asked[:8])
