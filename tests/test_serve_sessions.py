"""Conversations: a follow-up sends what is new, a restart goes on, nobody else's is read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import lminf_export
from lminf_export.errors import InputError, ParkedSessionError
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.parking import age as parking_age
from lminf_export.serve import session_folder
from lminf_export.serve.session_folder import SessionFolder
from tests.support import serving
from tests.support.serving import (
    CHAT,
    COMPLETIONS,
    ask,
    cached,
    content,
    offline_answer,
    offline_turns,
    wait_until,
)
from tests.support.tiny_bundle import TinyModel

FIRST = [{"role": "user", "content": "Tell me of Elizabeth."}]
SECOND = [{"role": "user", "content": "And of her sister?"}]


@pytest.fixture(scope="module")
def server(demo_lm):
    with serving.server_thread(demo_lm, slots=2) as server:
        yield server


def test_a_follow_up_sends_only_what_is_new(server, demo_lm):
    first, second = ask(server.url, "new", FIRST), ask(server.url, "new", SECOND)
    assert first.headers["x-session-state"] == "new"
    assert second.headers["x-session-state"] == "resumed"
    assert [content(first), content(second)] == offline_turns(demo_lm, FIRST, SECOND)
    usage = first.json()["usage"]
    assert cached(first) == 0
    # All was read but the latest token that was written.
    assert cached(second) == usage["prompt_tokens"] + usage["completion_tokens"] - 1


def test_a_follow_up_may_send_everything_again(server, demo_lm):
    first = content(ask(server.url, "whole", FIRST))
    said = [*FIRST, {"role": "assistant", "content": first}, *SECOND]
    second = ask(server.url, "whole", said)
    assert [first, content(second)] == offline_turns(demo_lm, FIRST, SECOND)
    assert cached(second) > 0
    again = ask(server.url, "whole", [*said, {"role": "assistant", "content": content(second)}])
    assert again.status_code == 400


def test_another_history_begins_the_session_anew(server, demo_lm):
    content(ask(server.url, "edited", FIRST))
    edited = [*FIRST, {"role": "assistant", "content": "No."}, *SECOND]
    found = ask(server.url, "edited", edited)
    assert cached(found) == 0
    assert content(found) == offline_answer(demo_lm, edited, 20)


def test_a_prompt_without_a_session_goes_on_from_the_state_of_one(server):
    first = ask(server.url, "shared", FIRST)
    second = ask(server.url, "shared", SECOND)
    history = [
        *FIRST,
        {"role": "assistant", "content": content(first)},
        *SECOND,
        {"role": "assistant", "content": content(second)},
        *SECOND,
    ]
    read = second.json()["usage"]["total_tokens"] - 1
    alone, third = ask(server.url, None, history), ask(server.url, "shared", SECOND)
    assert cached(alone) == cached(third) == read
    assert content(alone) == content(third)


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_text_goes_on_where_it_ended(server, demo_lm, as_ids):
    name, codec = f"text-{as_ids}", demo_lm.codec
    prompt = "It is a truth"
    ids = codec.encode(prompt)
    written = list(demo_lm.generate(ids, max_new_tokens=40))
    whole = "".join(codec.stream(written, after=ids))
    first = ask(server.url, name, ids if as_ids else prompt, path=COMPLETIONS)
    # What is new is nothing: the text goes on.
    second = ask(server.url, name, "" if not as_ids else ids + written[:20], path=COMPLETIONS)
    assert content(first) + content(second) == whole
    assert cached(second) == len(ids) + 19
    if not as_ids:
        third = ask(server.url, name, prompt + whole + " And", path=COMPLETIONS)
        assert cached(third) == len(ids) + 39
        refused = ask(server.url, name, FIRST)
        assert refused.status_code == 400


def test_a_session_is_one_request_at_a_time(server):
    ended = []
    body = {"prompt": "It is", "max_tokens": 100000, "ignore_eos": True, "stream": True}

    def read():
        with httpx.stream(
            "POST", server.url + COMPLETIONS, json=body, headers={"x-session-id": "busy"}
        ) as response:
            for line in response.iter_lines():
                if line and ended:
                    break

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: server.stats().active == 1)
    refused = ask(server.url, "busy", "more", path=COMPLETIONS)
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "session_busy"
    assert ask(server.url, "other", "more", path=COMPLETIONS).status_code == 200
    ended.append(True)
    thread.join()
    # An answer that its client did not take whole was none.
    wait_until(lambda: not server.app.state.serving.running)
    assert ask(server.url, "busy", "more", path=COMPLETIONS).headers["x-session-state"] == "new"


def test_names_of_sessions_are_checked(server):
    for name in ("", "a" * 129, "a/b", "a,b", "a b", ".", ".."):
        assert ask(server.url, name, FIRST).status_code == 400
    assert ask(server.url, "n", FIRST, n=2).status_code == 400
    assert ask(server.url, "A.b_c-1" + "9" * 120, FIRST).status_code == 200


def test_a_deleted_session_is_gone(server):
    content(ask(server.url, "gone", FIRST))
    assert httpx.delete(f"{server.url}/v1/sessions/gone").json()["deleted"] is True
    assert httpx.delete(f"{server.url}/v1/sessions/gone").status_code == 404
    must = {"x-session-id": "gone", "x-session-must-exist": "1"}
    body = {"messages": SECOND, "max_tokens": 1}
    refused = httpx.post(server.url + CHAT, json=body, headers=must)
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "session_not_found"


@pytest.mark.slow
def test_the_memory_of_sessions_is_bounded(demo_lm):
    sizes = {"session_bytes": 1 << 20, "prefix_bytes": 1 << 18}
    with serving.server_thread(demo_lm, **sizes) as server:
        for number in range(12):
            content(ask(server.url, f"s{number}", FIRST))
            counts = httpx.get(f"{server.url}/v1/sessions").json()
            assert counts["bytes"] <= sum(sizes.values())
        assert 0 < counts["prefixes"] < 12
        assert 1 < counts["sessions"] < 12
        assert ask(server.url, "s11", SECOND).headers["x-session-state"] == "resumed"
        assert ask(server.url, "s0", SECOND).headers["x-session-state"] == "new"


def test_a_session_belongs_to_the_key_that_began_it(demo_lm):
    with serving.server_thread(demo_lm, api_keys=("one", "two")) as server:
        prompt = "It is a truth universally"
        first = content(ask(server.url, "mine", FIRST, "one"))
        assert ask(server.url, "mine", SECOND, "two").headers["x-session-state"] == "new"
        deleted = httpx.delete(
            f"{server.url}/v1/sessions/mine", headers={"authorization": "Bearer two"}
        )
        assert deleted.status_code == 200
        mine = ask(server.url, "mine", SECOND, "one")
        assert mine.headers["x-session-state"] == "resumed"
        assert first
        # So are states that other prompts go on from.
        written = content(ask(server.url, None, prompt, "one", COMPLETIONS))
        longer = prompt + written + " she said"
        assert cached(ask(server.url, None, longer, "two", COMPLETIONS)) == 0
        assert cached(ask(server.url, None, longer, "one", COMPLETIONS)) > 0


def test_a_prompt_goes_on_from_the_longest_state_that_it_begins_with(server, demo_lm):
    ids = demo_lm.codec.encode("In the beginning of knowledge, received of her")
    whole = list(demo_lm.generate(ids, max_new_tokens=60))

    def written(prompt, count, **more):
        found = ask(
            server.url, None, prompt, path=COMPLETIONS, max_tokens=count, logprobs=0, **more
        )
        return found, found.json()["choices"][0]["text"]

    first, text = written(ids, 20)
    assert cached(first) == 0
    after = [*ids, *whole[:20]]
    second, more = written(after, 20)
    assert cached(second) == len(ids) + 19
    third, most = written([*ids, *whole[:40]], 20)
    assert cached(third) == len(ids) + 39
    assert text + more + most == "".join(demo_lm.codec.stream(whole, after=ids))
    # One other token, and nothing of it is known.
    changed = [(after[0] + 1) % demo_lm.vocab_size, *after[1:]]
    assert cached(written(changed, 5)[0]) == 0
    assert cached(written(after, 5, repetition_penalty=1.1)[0]) == 0


def test_no_prefix_is_reused_where_that_is_off(demo_lm):
    with serving.server_thread(demo_lm, prefix_reuse=False) as server:
        ids = demo_lm.codec.encode("It is a truth universally acknowledged, that a single man")
        for prompt in (ids, [*ids, *list(demo_lm.generate(ids, max_new_tokens=20))]):
            assert cached(ask(server.url, None, prompt, path=COMPLETIONS)) == 0
        assert httpx.get(f"{server.url}/v1/sessions").json()["prefixes"] == 0


def test_a_restarted_server_goes_on(demo_lm, tmp_path):
    folder = tmp_path / "sessions"
    expected = offline_turns(demo_lm, FIRST, SECOND)
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        assert content(ask(server.url, "kept", FIRST)) == expected[0]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert not any("kept" in path.name for path in folder.iterdir())
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        found = ask(server.url, "kept", SECOND)
        assert found.headers["x-session-state"] == "resumed"
        assert content(found) == expected[1]


@pytest.mark.slow
def test_a_killed_server_goes_on_with_what_it_had_written(demo_bundle, demo_lm, tmp_path):
    folder = tmp_path / "sessions"
    options = ("--session-folder", str(folder), "--threads", "1")
    with serving.server_process(demo_bundle, *options) as server:
        content(ask(server.url, "kept", FIRST))
        wait_until(lambda: httpx.get(f"{server.url}/v1/sessions").json()["files"] == 1)
        server.process.kill()
        server.process.wait()
    left = [f"{'0' * 64}-{'1' * 8}.state.part", f"{'0' * 64}.json.part", ".state-abc_1234"]
    for name in left:
        (folder / name).write_bytes(b"half")
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        found = ask(server.url, "kept", SECOND)
        assert content(found) == offline_turns(demo_lm, FIRST, SECOND)[1]
        assert not any((folder / name).exists() for name in left)


@pytest.mark.slow
def test_what_a_client_has_seen_to_its_end_outlives_a_kill(demo_bundle, demo_lm, tmp_path):
    options = ("--session-folder", str(tmp_path / "s"), "--session-durable", "--threads", "1")
    turns = [FIRST, SECOND, FIRST]
    answers = []
    for number, turn in enumerate(turns):
        with serving.server_process(demo_bundle, *options) as server:
            found = ask(server.url, "kept", turn)
            server.process.kill()
            server.process.wait()
        answers.append(content(found))
        assert found.headers["x-session-state"] == ("resumed" if number else "new")
    assert answers == offline_turns(demo_lm, *turns)


@pytest.mark.parametrize("failure", ["fails", "has no room"])
def test_a_conversation_that_cannot_be_written_is_an_error_where_it_must_be(
    demo_lm, tmp_path, monkeypatch, failure
):
    room = {"session_disk_bytes": 1000} if failure == "has no room" else {}
    settings = {"session_folder": tmp_path / "s", "session_durable": True, **room}
    if failure == "fails":

        def fails(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(SessionFolder, "save", fails)
    with serving.server_thread(demo_lm, **settings) as server:
        found = ask(server.url, "kept", FIRST)
        assert found.status_code == 500
        assert found.json()["error"]["code"] == "session_not_written"
        streamed = ask(server.url, "kept", FIRST, stream=True)
        assert "session_not_written" in streamed.text
        assert 'finish_reason":"' not in streamed.text
        again = httpx.post(
            server.url + CHAT,
            json={"messages": SECOND},
            headers={"x-session-id": "kept", "x-session-must-exist": "1"},
        )
        assert again.status_code == 404
        # Without a conversation there is nothing to write.
        assert content(ask(server.url, None, FIRST)) == offline_turns(demo_lm, FIRST)[0]


def test_files_that_cannot_be_removed_stop_no_answer(demo_lm, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise PermissionError(13, "Permission denied")

    with serving.server_thread(demo_lm, session_folder=tmp_path) as server:
        first = content(ask(server.url, "kept", FIRST))
        wait_until(lambda: httpx.get(f"{server.url}/v1/sessions").json()["files"] == 1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fails)
            patch.setattr(Path, "rename", fails)
            found = ask(server.url, "kept", SECOND)
            assert [first, content(found)] == offline_turns(demo_lm, FIRST, SECOND)
            wait_until(lambda: "could not be written" in caplog.text)
            told = httpx.delete(f"{server.url}/v1/sessions/kept")
        assert (told.status_code, told.json()["error"]["code"]) == (500, "session_not_removed")
        assert httpx.delete(f"{server.url}/v1/sessions/kept").status_code == 200
        assert not list(tmp_path.glob("*.json"))
    assert "Traceback" not in caplog.text


def test_names_that_are_not_surely_on_the_disk_leave_no_files(demo_lm, tmp_path, monkeypatch):
    def fails(_):
        raise OSError(5, "Input/output error")

    with serving.server_thread(demo_lm, session_folder=tmp_path, session_durable=True) as server:
        content(ask(server.url, "kept", FIRST))
        monkeypatch.setattr(SessionFolder, "_sync", fails)
        for name in ("kept", "new"):
            assert ask(server.url, name, SECOND).json()["error"]["code"] == "session_not_written"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_conversation_that_is_deleted_while_it_is_loaded_stays_deleted(
    demo_lm, kept_folder, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    load, loading, deleted = SessionFolder.load, threading.Event(), threading.Event()

    def slow(*arguments):
        found = load(*arguments)
        loading.set()
        assert deleted.wait(20)
        return found

    monkeypatch.setattr(SessionFolder, "load", slow)
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        told = []
        client = threading.Thread(target=lambda: told.append(ask(server.url, "kept", SECOND)))
        client.start()
        assert loading.wait(20)
        assert httpx.delete(f"{server.url}/v1/sessions/kept").status_code == 200
        deleted.set()
        client.join(20)
        assert told[0].headers["x-session-state"] == "new"
        assert httpx.delete(f"{server.url}/v1/sessions/kept").status_code == 404
        assert httpx.get(f"{server.url}/v1/sessions").json()["sessions"] == 0


def test_a_request_that_comes_while_its_session_is_deleted_is_refused(
    demo_lm, kept_folder, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    drop, dropping, may_drop = SessionFolder.drop, threading.Event(), threading.Event()

    def slow(*arguments):
        dropping.set()
        assert may_drop.wait(20)
        return drop(*arguments)

    monkeypatch.setattr(SessionFolder, "drop", slow)
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        told = []
        url = f"{server.url}/v1/sessions/kept"
        client = threading.Thread(target=lambda: told.append(httpx.delete(url, timeout=30)))
        client.start()
        assert dropping.wait(20)
        found = ask(server.url, "kept", SECOND)
        assert (found.status_code, found.json()["error"]["code"]) == (409, "session_busy")
        may_drop.set()
        client.join(20)
        assert told[0].status_code == 200
        assert ask(server.url, "kept", SECOND).headers["x-session-state"] == "new"


def test_a_conversation_that_is_too_large_for_the_folder_costs_no_other(demo_lm, tmp_path, caplog):
    settings = {"session_folder": tmp_path, "session_disk_bytes": 600_000}
    with serving.server_thread(demo_lm, **settings) as server:
        ask(server.url, "small", FIRST)
        ask(server.url, "large", [{"role": "user", "content": "Tell me of Elizabeth. " * 100}])
        wait_until(lambda: "see --session-disk-bytes" in caplog.text)
    with serving.server_thread(demo_lm, **settings) as server:
        states = [ask(server.url, name, SECOND).headers["x-session-state"]
                  for name in ("small", "large")]  # fmt: skip
        assert states == ["resumed", "new"]


def cut(data):
    return data[: len(data) // 2]


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def changed_record(**fields):
    return lambda data: json.dumps({**json.loads(data), **fields}).encode()


DAMAGES = [
    (".state", cut), (".state", flipped), (".state", lambda _: b""), (".json", cut),
    (".json", lambda _: b"[]"), (".json", lambda _: b"\xff"),
    (".json", changed_record(format=2)), (".json", changed_record(unread=[-1])),
    (".json", changed_record(unread=[10**9])), (".json", changed_record(unread=[0] * 1000)),
    (".json", changed_record(unread=5)), (".json", changed_record(state="../x")),
    (".json", changed_record(state=7)), (".json", changed_record(history="zz")),
    (".json", changed_record(history=None)), (".json", changed_record(history_length=-1)),
    (".json", changed_record(history_length="1")), (".json", changed_record(kind="other")),
    (".json", changed_record(kind=["chat"])), (".json", changed_record(bytes=True)),
    (".json", changed_record(bytes="x")), (".json", changed_record(sha256="0" * 64)),
    (".json", lambda _: b"[" * 60_000), (".json", lambda data: data[:-1] + b" " * 2**20 + b"}"),
    (".json", changed_record(system=5)), (".json", changed_record(turn=-1)),
]  # fmt: skip


@pytest.fixture(scope="module")
def kept_folder(demo_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "sessions"
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        content(ask(server.url, "kept", FIRST))
    return folder


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_damaged_files_are_refused_until_they_are_deleted(demo_lm, kept_folder, tmp_path, number):
    suffix, damage = DAMAGES[number]
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    [record] = folder.glob("*.json")
    [path] = folder.glob("*" + suffix)
    path.write_bytes(damage(path.read_bytes()))
    sessions = SessionFolder(folder, 1 << 30)
    assert refused(sessions, record.stem, demo_lm) == "damaged"
    assert sessions.counts()[0] == 1
    assert sessions.drop(record.stem)
    assert sessions.load(record.stem, demo_lm) is None
    assert {path.name for path in folder.iterdir()} == {".lock"}
    sessions.close()


def refused(sessions, key, lm):
    with pytest.raises(ParkedSessionError) as found:
        sessions.load(key, lm)
    return found.value.reason


def huge(path):
    path.write_text("{}")
    os.truncate(path, 1 << 40)


def full_folder(path):
    path.mkdir()
    (path / "other").write_text("")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".state", ".json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, huge, full_folder])
def test_what_stands_in_place_of_a_file_stops_no_server(
    demo_lm, kept_folder, tmp_path, suffix, make
):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    [record] = folder.glob("*.json")
    [path] = folder.glob("*" + suffix)
    path.unlink()
    make(path)
    sessions = SessionFolder(folder, 1 << 30)
    assert refused(sessions, record.stem, demo_lm) == "damaged"
    if make is full_folder and suffix == ".json":  # others' files are not removed
        with pytest.raises(OSError, match="not empty"):
            sessions.drop(record.stem)
    else:
        assert sessions.drop(record.stem)
    assert sessions.load(record.stem, demo_lm) is None
    assert [path.is_dir() for path in folder.iterdir()].count(True) == (make is full_folder)
    sessions.close()


@pytest.mark.timeout(60)
def test_what_comes_in_place_of_a_file_later_is_not_waited_for(demo_lm, kept_folder, tmp_path):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    [record], [state] = folder.glob("*.json"), folder.glob("*.state")
    sessions = SessionFolder(folder, 1 << 30)
    state.unlink()
    os.mkfifo(state)
    assert refused(sessions, record.stem, demo_lm) == "damaged"
    sessions.close()


def test_a_size_beyond_all_numbers_is_damage(demo_lm, kept_folder, tmp_path):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    [record] = folder.glob("*.json")
    record.write_text(record.read_text().replace('"bytes": ', '"bytes": 1e999, "was": '))
    sessions = SessionFolder(folder, 1 << 30)
    assert sessions.counts() == (1, 0)
    assert refused(sessions, record.stem, demo_lm) == "damaged"
    sessions.close()


def test_a_server_goes_on_without_a_damaged_file(demo_lm, kept_folder, tmp_path):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    [path] = folder.glob("*.state")
    path.write_bytes(flipped(path.read_bytes()))
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        url = f"{server.url}/v1/sessions/kept"
        for found in (ask(server.url, "kept", SECOND), httpx.get(url)):
            assert (found.status_code, found.json()["error"]["code"]) == (410, "session_damaged")
        assert httpx.delete(url).status_code == 200
        found = ask(server.url, "kept", FIRST)
        assert found.headers["x-session-state"] == "new"
        assert content(found) == offline_turns(demo_lm, FIRST)[0]
    assert len(list(folder.glob("*.state"))) == 1


def test_a_conversation_that_is_too_old_is_refused_and_removed_later(
    demo_lm, kept_folder, tmp_path
):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    [record] = folder.glob("*.json")
    age(record, 150)
    with serving.server_thread(demo_lm, session_folder=folder, session_max_age=100.0) as server:
        found = ask(server.url, "kept", SECOND)
        assert (found.status_code, found.json()["error"]["code"]) == (410, "session_expired")
        assert "150." in found.json()["error"]["message"]
    age(record, 150)
    sessions = SessionFolder(folder, 1 << 30, 200.0)
    conversation = sessions.load(record.stem, demo_lm)
    assert sessions.is_latest(record.stem, conversation)
    assert not sessions.is_latest(record.stem, replace(conversation, written=time.time() - 201))
    sessions.close()
    age(record, 201)
    SessionFolder(folder, 1 << 30, 100.0).close()
    assert {path.name for path in folder.iterdir()} == {".lock"}


def test_a_conversation_in_memory_grows_too_old_as_its_file_does(demo_lm, tmp_path, monkeypatch):
    settings = {"session_folder": tmp_path, "session_max_age": 100.0, "session_durable": True}
    with serving.server_thread(demo_lm, **settings) as server:
        content(ask(server.url, "idle", FIRST))
        assert ask(server.url, "idle", SECOND).headers["x-session-state"] == "resumed"
        later = SimpleNamespace(time=lambda: time.time() + 101)
        monkeypatch.setattr(parking_age, "time", later)
        found = ask(server.url, "idle", SECOND)
        assert (found.status_code, found.json()["error"]["code"]) == (410, "session_expired")


def test_a_file_that_cannot_be_read_now_is_no_damage(demo_lm, kept_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    with serving.server_thread(demo_lm, session_folder=folder) as server:
        with monkeypatch.context() as broken:
            broken.setattr(session_folder, "_digest", failing)
            found = ask(server.url, "kept", SECOND)
            code = found.json()["error"]["code"]
            assert (found.status_code, code) == (503, "session_store_unavailable")
        assert ask(server.url, "kept", SECOND).headers["x-session-state"] == "resumed"


def test_a_turn_that_is_written_while_the_one_before_is_read_is_found(
    demo_lm, kept_folder, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    [record] = folder.glob("*.json")
    sessions = SessionFolder(folder, 1 << 30)
    first, digest = sessions.load(record.stem, demo_lm), session_folder._digest

    def late(path):
        monkeypatch.setattr(session_folder, "_digest", digest)
        sessions.save(record.stem, replace(first, turn=7))
        return digest(path)

    monkeypatch.setattr(session_folder, "_digest", late)
    assert sessions.load(record.stem, demo_lm).turn == 7
    sessions.close()


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def failing(path):
    raise OSError(errno.EIO, "Input/output error")


def test_another_model_s_conversation_is_foreign(kept_folder, tmp_path):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    other = TinyModel(vocab_size=4096).write(tmp_path / "other")
    sessions = SessionFolder(folder, 1 << 30)
    [record] = folder.glob("*.json")
    assert refused(sessions, record.stem, lminf_export.load(other.path)) == "foreign"
    sessions.close()


def test_the_oldest_files_make_room(demo_lm, tmp_path):
    with serving.server_thread(
        demo_lm, session_folder=tmp_path, session_disk_bytes=400_000
    ) as server:
        for number in range(5):
            content(ask(server.url, f"s{number}", FIRST))
    counts = {path.stat().st_size for path in tmp_path.glob("*.state")}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.state")) <= 400_000
    assert counts


def test_a_folder_has_one_server(demo_lm, tmp_path):
    with (
        serving.server_thread(demo_lm, session_folder=tmp_path),
        pytest.raises(InputError, match="another server"),
        serving.server_thread(demo_lm, session_folder=tmp_path),
    ):
        pass


NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant ({{ messages[0].content }}):{% endif %}"
)


def test_a_template_heeds_the_system_message_in_a_follow_up_and_after_a_restart(demo_lm, tmp_path):
    template = ChatTemplate(NEEDS_SYSTEM)
    system = {"role": "system", "content": "briefly"}
    state, expected, unread = demo_lm.new_state(), [], []
    texts = [
        template.render([system, *FIRST]),
        template.turn(SECOND, system="briefly"),
        template.turn(FIRST, system="briefly"),
    ]
    assert all(text.endswith("assistant (briefly):") for text in texts)
    for number, text in enumerate(texts):
        ids = demo_lm.codec.ids_behind(text) if number else demo_lm.codec.ids(text)
        ids = [*unread, *ids]
        written = list(demo_lm.generate(ids, max_new_tokens=8, state=state))
        unread = written[-1:]
        expected.append("".join(demo_lm.codec.stream(written, after=ids)))
    found = []
    for turns in ([[system, *FIRST], SECOND], [FIRST]):
        with serving.server_thread(demo_lm, session_folder=tmp_path / "s") as server:
            server.model.template = template
            found += [content(ask(server.url, "a", turn, max_tokens=8)) for turn in turns]
    assert found == expected


def test_a_turn_that_cannot_be_written_leaves_no_earlier_one(demo_lm, tmp_path, monkeypatch):
    folder = tmp_path / "sessions"
    with serving.server_thread(demo_lm, session_folder=folder, session_bytes=0) as server:
        content(ask(server.url, "a", FIRST))
        wait_until(lambda: httpx.get(f"{server.url}/v1/sessions").json()["files"] == 1)
        monkeypatch.setattr(SessionFolder, "_save", _no_room)
        content(ask(server.url, "a", SECOND))
        wait_until(lambda: httpx.get(f"{server.url}/v1/sessions").json()["files"] == 0)
        must = {"x-session-id": "a", "x-session-must-exist": "1"}
        body = {"messages": SECOND, "max_tokens": 3}
        assert httpx.post(server.url + CHAT, json=body, headers=must).status_code == 404


def _no_room(folder, key, conversation):
    raise OSError(28, "No space left on device")


def test_a_folder_holds_no_more_than_it_may_after_a_restart(kept_folder, tmp_path):
    folder = Path(shutil.copytree(kept_folder, tmp_path / "copy"))
    sessions = SessionFolder(folder, 1000)
    assert sessions.counts() == (0, 0)
    sessions.close()
