"""Servers that share a store: a conversation goes on at any of them, once, and unchanged."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from contextlib import ExitStack

import httpx
import pytest
from click.testing import CliRunner

from lminf_export import load
from lminf_export.cli.serve import serve_command
from lminf_export.errors import ConfigError, ParkingError, StaleTurnError
from lminf_export.runtime.batching.request import Kept
from lminf_export.runtime.parking import session_store
from lminf_export.runtime.parking.session_store import SessionStore
from lminf_export.serve.credentials import secrets_of
from lminf_export.serve.rolling import RollingHash
from lminf_export.serve.sessions import Sessions
from lminf_export.serve.settings import ServeSettings
from lminf_export.serve.state_store import Conversation, StateStore
from tests.support import serving
from tests.support.serving import CHAT, ask, cached, content, offline_turns, wait_until

SECRET = "0123456789abcdef" * 4
TURNS = [
    [{"role": "user", "content": text}]
    for text in ("Tell me of Elizabeth.", "And of her sister?", "And then?", "Who said so?")
]


@pytest.fixture(scope="module")
def other_lm(demo_bundle):
    return load(demo_bundle, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def shared(folder, **limits):
    return {"session_store": str(folder), "session_secrets": (SECRET,), **limits}


@pytest.fixture(scope="module")
def servers(demo_lm, other_lm, folder):
    with ExitStack() as stack:
        yield [
            stack.enter_context(serving.server_thread(lm, **shared(folder)))
            for lm in (demo_lm, other_lm)
        ]


def the_object(folder):
    """Return the largest object of a store: that of its only session."""
    return max(
        (path for path in folder.rglob("0*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def code(response):
    return response.status_code, response.json()["error"]["code"]


def test_a_conversation_goes_on_at_another_server(servers, demo_lm):
    answers = [ask(servers[number % 2].url, "moves", turn) for number, turn in enumerate(TURNS)]
    assert [content(answer) for answer in answers] == offline_turns(demo_lm, *TURNS)
    assert [answer.headers["x-session-state"] for answer in answers] == ["new"] + ["resumed"] * 3
    assert all(cached(answer) for answer in answers[1:])


def test_a_server_that_answered_an_earlier_turn_knows_the_later_ones(servers, demo_lm):
    order = (0, 1, 1, 0)  # the first server still has its first turn in memory
    answers = [
        ask(servers[place].url, "back", turn) for place, turn in zip(order, TURNS, strict=True)
    ]
    assert [content(answer) for answer in answers] == offline_turns(demo_lm, *TURNS)


def test_a_conversation_that_one_server_ends_has_ended_at_all(servers):
    ask(servers[0].url, "ends", TURNS[0])
    content(ask(servers[1].url, "ends", TURNS[1]))
    assert httpx.delete(f"{servers[1].url}/v1/sessions/ends").status_code == 200
    assert httpx.delete(f"{servers[0].url}/v1/sessions/ends").status_code == 404
    found = ask(servers[0].url, "ends", TURNS[1])
    assert (found.status_code, found.headers["x-session-state"]) == (200, "new")


def test_a_conversation_that_was_begun_again_elsewhere_is_not_mixed_up(servers, demo_lm):
    """Its turns are counted on, so the copy in one server's memory is known to be another's."""
    content(ask(servers[0].url, "again", TURNS[2]))
    assert httpx.delete(f"{servers[1].url}/v1/sessions/again").status_code == 200
    content(ask(servers[1].url, "again", TURNS[0]))
    found = ask(servers[0].url, "again", TURNS[1])
    assert content(found) == offline_turns(demo_lm, *TURNS[:2])[1]


def test_a_session_that_began_again_in_an_emptied_store_is_no_other(demo_lm, other_lm, tmp_path):
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(serving.server_thread(lm, **shared(tmp_path)))
            for lm in (demo_lm, other_lm)
        )
        content(ask(first.url, "emptied", TURNS[2]))
        the_object(tmp_path).unlink()
        content(ask(second.url, "emptied", TURNS[0]))
        where = httpx.get(f"{first.url}/v1/sessions/emptied").json()
        found = ask(first.url, "emptied", TURNS[1])
    assert where["turn"] == 1
    assert content(found) == offline_turns(demo_lm, *TURNS[:2])[1]


def test_of_two_servers_that_answer_one_turn_one_is_refused(servers, demo_lm):
    content(ask(servers[0].url, "twice", TURNS[0]))
    told = []
    together = threading.Barrier(2)

    def go_on(server):
        together.wait()
        told.append(ask(server.url, "twice", TURNS[1], max_tokens=200, ignore_eos=True))

    threads = [threading.Thread(target=go_on, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in told) == [200, 409]
    refused = next(answer for answer in told if answer.status_code == 409)
    assert code(refused) == (409, "session_conflict")
    kept = content(next(answer for answer in told if answer.status_code == 200))
    # Both servers go on from the one that counts.
    whole = [*TURNS[0], {"role": "assistant", "content": offline_turns(demo_lm, TURNS[0])[0]},
             *TURNS[1], {"role": "assistant", "content": kept}, *TURNS[2]]  # fmt: skip
    for server, sent in zip(servers, (whole, TURNS[3]), strict=True):
        assert ask(server.url, "twice", sent).headers["x-session-state"] == "resumed"


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_an_answer_that_is_deleted_meanwhile_is_no_part_of_it(servers, place):
    content(ask(servers[0].url, "gone", TURNS[0]))
    told = []
    client = threading.Thread(
        target=lambda: told.append(
            ask(servers[0].url, "gone", TURNS[1], max_tokens=2000, ignore_eos=True)
        )
    )
    client.start()
    wait_until(lambda: servers[0].stats().active == 1)
    assert httpx.delete(f"{servers[place].url}/v1/sessions/gone").status_code == 200
    client.join()
    assert code(told[0]) == (409, "session_conflict")
    assert ask(servers[1].url, "gone", TURNS[0]).headers["x-session-state"] == "new"


@pytest.mark.slow
def test_a_killed_server_loses_nothing_that_a_client_has_the_end_of(demo_bundle, demo_lm, tmp_path):
    options = ("--session-store", str(tmp_path))
    with serving.server_process(demo_bundle, *options, LMINF_SESSION_SECRET=SECRET) as first:
        told = [content(ask(first.url, f"s{n}", TURNS[0])) for n in range(4)]
        first.process.send_signal(signal.SIGKILL)
    with serving.server_process(demo_bundle, *options, LMINF_SESSION_SECRET=SECRET) as second:
        for number in range(4):
            found = ask(second.url, f"s{number}", TURNS[1])
            assert found.headers["x-session-state"] == "resumed"
            told.append(content(found))
    assert told == [answer for answer in offline_turns(demo_lm, *TURNS[:2]) for _ in range(4)]


def test_a_session_belongs_to_the_key_that_began_it(demo_lm, other_lm, tmp_path):
    keys = {"api_keys": ("mine", "theirs")}
    with serving.server_thread(demo_lm, **shared(tmp_path, **keys)) as first:
        content(ask(first.url, "stolen", TURNS[0], key="mine"))
    with serving.server_thread(other_lm, **shared(tmp_path, **keys)) as second:
        assert ask(second.url, "stolen", TURNS[1], key="theirs").headers["x-session-state"] == "new"
        assert (
            ask(second.url, "stolen", TURNS[1], key="mine").headers["x-session-state"] == "resumed"
        )
        gone = httpx.delete(
            f"{second.url}/v1/sessions/nothing", headers={"authorization": "Bearer theirs"}
        )
        assert gone.status_code == 404


def test_another_secret_opens_nothing(demo_lm, other_lm, tmp_path):
    with serving.server_thread(demo_lm, **shared(tmp_path)) as first:
        content(ask(first.url, "sealed", TURNS[0]))
    limits = shared(tmp_path) | {"session_secrets": ("f" * 64,)}
    with serving.server_thread(other_lm, **limits) as second:
        assert ask(second.url, "sealed", TURNS[1]).headers["x-session-state"] == "new"


@pytest.mark.slow
def test_changed_objects_are_refused_until_the_session_is_deleted(demo_lm, tmp_path):
    rng = random.Random(1)
    with serving.server_thread(demo_lm, **shared(tmp_path, session_bytes=0)) as server:
        content(ask(server.url, "changed", TURNS[0]))
        path = the_object(tmp_path)
        good = path.read_bytes()
        for number in range(200):
            data = bytearray(good)
            place = rng.randrange(2000 if number % 2 else len(good))
            if number % 3 == 0:
                del data[place:]
            elif number % 3 == 1:
                data[place] ^= 1 << rng.randrange(8)
            else:
                data[place:place] = rng.randbytes(5)
            path.write_bytes(data)
            assert code(ask(server.url, "changed", TURNS[1])) == (410, "session_damaged")
        assert server.stats().active == 0
        path.write_bytes(good)
        assert ask(server.url, "changed", TURNS[1]).headers["x-session-state"] == "resumed"
        path = the_object(tmp_path)
        path.write_bytes(path.read_bytes()[:-1])
        assert code(ask(server.url, "changed", TURNS[2])) == (410, "session_damaged")
        assert httpx.delete(f"{server.url}/v1/sessions/changed").status_code == 200
        assert ask(server.url, "changed", TURNS[0]).headers["x-session-state"] == "new"


def test_expired_and_foreign_sessions_are_refused(demo_lm, other_lm, tmp_path, monkeypatch):
    limits = shared(tmp_path, session_max_age=100.0)
    with serving.server_thread(demo_lm, **limits) as first:
        content(ask(first.url, "old", TURNS[0]))
        content(ask(first.url, "other", TURNS[0]))
    with serving.server_thread(other_lm, **limits) as second:
        now = session_store.time.time()
        with monkeypatch.context() as patched:
            patched.setattr(session_store.time, "time", lambda: now + 150)
            assert code(ask(second.url, "old", TURNS[1])) == (410, "session_expired")
        with monkeypatch.context() as patched:
            patched.setattr(other_lm, "state_id", "0" * 64)
            assert code(ask(second.url, "other", TURNS[1])) == (410, "session_foreign")
        assert ask(second.url, "other", TURNS[1]).headers["x-session-state"] == "resumed"


def test_a_session_of_another_tokenizer_is_foreign(demo_lm, other_lm, tmp_path, monkeypatch):
    """Its state would fit, but the same text has other tokens, or its messages another form."""
    limits = shared(tmp_path)
    with serving.server_thread(demo_lm, **limits) as first:
        content(ask(first.url, "words", TURNS[0]))
    with serving.server_thread(other_lm, **limits) as second:
        files = other_lm.bundle.manifest.files
        for name in ("tokenizer.json", "chat_template.jinja"):
            with monkeypatch.context() as patched:
                changed = files[name].model_copy(update={"sha256": "0" * 64})
                patched.setitem(files, name, changed)
                assert code(ask(second.url, "words", TURNS[1])) == (410, "session_foreign")
        assert ask(second.url, "words", TURNS[1]).headers["x-session-state"] == "resumed"


def test_a_store_that_vanishes_is_told_and_its_sessions_go_on(demo_lm, other_lm, tmp_path):
    place, away = tmp_path / "store", tmp_path / "away"
    with serving.server_thread(demo_lm, **shared(place)) as server:
        content(ask(server.url, "kept", TURNS[0]))
        place.rename(away)
        place.mkdir()  # a mount point without its file system
        url = f"{server.url}/v1/sessions/kept"
        assert code(ask(server.url, "kept", TURNS[1])) == (503, "session_store_unavailable")
        assert code(httpx.get(url)) == (503, "session_store_unavailable")
        assert code(httpx.delete(url)) == (503, "session_not_removed")
        assert list(place.iterdir()) == []
        place.rmdir()
        away.rename(place)
        assert content(ask(server.url, "kept", TURNS[1])) == offline_turns(demo_lm, *TURNS[:2])[1]


def test_a_session_of_one_model_does_not_hide_that_of_another(demo_lm, other_lm, tmp_path):
    limits = shared(tmp_path)
    with serving.server_thread(demo_lm, {"second": other_lm}, **limits) as server:
        content(ask(server.url, "both", TURNS[0], model=serving.NAME))
        first = the_object(tmp_path)
        assert ask(server.url, "both", TURNS[0], model="second").status_code == 200
        first.write_bytes(b"damaged")
        url = f"{server.url}/v1/sessions/both"
        assert httpx.get(url).json()["model"] == "second"
        assert httpx.delete(url).status_code == 200
        assert httpx.get(url).status_code == 404


def test_a_store_that_fails_is_told_and_loses_no_turn(demo_lm, tmp_path, monkeypatch, caplog):
    def failing(*_, **__):
        raise ParkingError("the network is down")

    with serving.server_thread(demo_lm, **shared(tmp_path)) as server:
        content(ask(server.url, "fails", TURNS[0]))
        with monkeypatch.context() as patched:
            patched.setattr(SessionStore, "is_latest", failing)
            found = ask(server.url, "fails", TURNS[1])
            assert code(found) == (503, "session_store_unavailable")
            assert found.headers["retry-after"]
        with monkeypatch.context() as patched:
            patched.setattr(SessionStore, "save", failing)
            assert code(ask(server.url, "fails", TURNS[1])) == (503, "session_not_written")
        with monkeypatch.context() as patched:
            patched.setattr(SessionStore, "drop", failing)
            kept = httpx.delete(f"{server.url}/v1/sessions/fails")
            assert code(kept) == (503, "session_not_removed")
            assert "may stand" in kept.json()["error"]["message"]
        assert "the network is down" in caplog.text
        answers = [content(ask(server.url, "fails", turn)) for turn in TURNS[1:3]]
        assert answers == offline_turns(demo_lm, *TURNS[:3])[1:]


@pytest.mark.slow
def test_a_store_that_hangs_holds_up_no_request_and_no_end(demo_lm, tmp_path, monkeypatch, caplog):
    may_end = threading.Event()

    def hanging(*_, **__):
        assert may_end.wait(60)
        raise ParkingError("too late")

    limits = shared(tmp_path, session_store_seconds=0.3)
    started = time.monotonic()
    try:
        with serving.server_thread(demo_lm, **limits) as server:
            content(ask(server.url, "hangs", TURNS[0]))
            with monkeypatch.context() as patched:
                patched.setattr(SessionStore, "is_latest", hanging)
                told = ask(server.url, "hangs", TURNS[1])
                assert code(told) == (503, "session_store_unavailable")
                told = httpx.get(f"{server.url}/v1/sessions/hangs")
                assert code(told) == (503, "session_store_unavailable")
            assert content(ask(server.url, "another", TURNS[0]))
            with monkeypatch.context() as patched:
                patched.setattr(SessionStore, "drop", hanging)
                told = httpx.delete(f"{server.url}/v1/sessions/another")
                assert code(told) == (503, "session_not_removed")
            monkeypatch.setattr(SessionStore, "save", hanging)
            told = ask(server.url, "hangs", TURNS[1])
            assert code(told) == (503, "session_not_written")
            assert "ask where it stands" in told.json()["error"]["message"]
            told = ask(server.url, "hangs", TURNS[1])  # not before the write has ended
            assert code(told) == (503, "session_store_unavailable")
        assert server.app.state.serving.sessions.is_stuck
        assert "what is not written by now is lost" in caplog.text
        assert time.monotonic() - started < 20
    finally:
        may_end.set()


HANGING = """
import sys, threading
from lminf_export.cli.main import main
from lminf_export.runtime.parking.session_store import SessionStore

setattr(SessionStore, sys.argv.pop(1), lambda *_, **__: threading.Event().wait())
sys.argv = ["lminf", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "told"),
    [("save", (503, "session_not_written")), ("latest", (503, "session_store_unavailable"))],
)
def test_a_server_ends_although_its_store_hangs(demo_bundle, tmp_path, method, told):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    options = ("--session-store", str(tmp_path / "s"), "--session-store-seconds", "0.3")
    with serving.server_process(
        demo_bundle, *options, program=(str(script), method), LMINF_SESSION_SECRET=SECRET
    ) as server:
        assert code(ask(server.url, "a", TURNS[0])) == told
        exit_code, said = server.end()
    assert exit_code == 1
    assert "the store does not answer" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_client_that_goes_at_the_end_leaves_one_turn_or_the_other(servers, demo_lm):
    body = {"messages": TURNS[0], "max_tokens": 20, "temperature": 0, "stream": True}
    expected = {
        "new": offline_turns(demo_lm, TURNS[1])[0],
        "resumed": offline_turns(demo_lm, *TURNS[:2])[1],
    }
    seen = set()
    for number in range(20):
        name = f"goes-{number}"
        headers = {"x-session-id": name}
        with httpx.stream("POST", servers[0].url + CHAT, json=body, headers=headers) as response:
            for place, line in enumerate(response.iter_lines()):
                if line and place >= number:
                    break
        wait_until(lambda: not servers[0].app.state.serving.running)
        found = ask(servers[0].url, name, TURNS[1])
        state = found.headers["x-session-state"]
        assert found.headers["x-session-turn"] == ("1" if state == "new" else "2")
        assert content(found) == expected[state]
        seen.add(state)
    assert seen == {"new", "resumed"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--session-store", "s"), "needs a secret"),
        (("--session-store", ""), "needs a secret"),
        (("--session-secret-file", "f"), "goes with a --session-store"),
        (("--session-store", "s", "--session-secret-file", "missing"), "missing"),
    ],
)
def test_options_are_checked_in_one_line(demo_bundle, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMINF_SESSION_SECRET", raising=False)
    result = CliRunner().invoke(serve_command, [str(demo_bundle), "--port", "0", *options])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"session_store": "s"}, "needs session_secrets"),
        ({"session_secrets": ("s",)}, "there is none"),
        ({"session_store": "", "session_secrets": ("s",)}, "is empty"),
        ({"session_store": "s", "session_secrets": ("s",), "session_folder": "f"}, "kept once"),
        ({"session_max_age": 0}, "session_max_age"),
        ({"session_store": 5}, "must be a path"),
        ({"session_store": "memory://s"}, "is of one process"),
        ({"session_store_seconds": 0}, "session_store_seconds"),
    ],
)
def test_settings_are_checked(fields, words):
    with pytest.raises(ConfigError, match=words):
        ServeSettings(**fields)


def test_a_file_of_secrets_may_begin_with_a_mark_of_its_encoding(tmp_path):
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n# before\n{'f' * 64}\n", encoding="utf-8-sig")
    assert secrets_of("store", str(path)) == (SECRET, "f" * 64)


@pytest.mark.parametrize(("mode", "is_told"), [(0o600, False), (0o440, False), (0o644, True)])
def test_a_secret_that_everybody_may_read_is_told(tmp_path, caplog, mode, is_told):
    path = tmp_path / "secret"
    path.write_text(SECRET)
    path.chmod(mode)
    assert secrets_of("store", str(path)) == (SECRET,)
    assert (f"{path}: every user of this machine may read it" in caplog.text) == is_told


def test_settings_do_not_show_their_secrets():
    settings = ServeSettings(api_keys=("a-key",), session_store="s", session_secrets=(SECRET,))
    assert SECRET not in repr(settings)
    assert "a-key" not in repr(settings)


def test_a_client_that_lost_an_end_can_ask_where_its_session_stands(servers):
    first = ask(servers[0].url, "asks", TURNS[0])
    assert first.headers["x-session-turn"] == "1"
    second = ask(servers[1].url, "asks", TURNS[1])
    assert second.headers["x-session-turn"] == "2"
    for server in servers:
        told = httpx.get(f"{server.url}/v1/sessions/asks").json()
        read = second.json()["usage"]["total_tokens"] - 1
        assert told == {
            "id": "asks", "object": "session", "model": "demo", "turn": 2, "tokens": read,
        }  # fmt: skip
    assert httpx.get(f"{servers[0].url}/v1/sessions/never").status_code == 404
    assert httpx.delete(f"{servers[0].url}/v1/sessions/asks").status_code == 200
    assert httpx.get(f"{servers[1].url}/v1/sessions/asks").status_code == 404


class SlowStore:
    """A store whose other server has answered turn 2 while ours is being saved."""

    is_shared, threads = True, 1

    def __init__(self, theirs):
        self.theirs, self.may_end = theirs, threading.Event()

    def latest(self, key):
        return 2

    def is_latest(self, key, conversation):
        return conversation is self.theirs

    def load(self, key, lm):
        return self.theirs

    def save(self, key, conversation):
        assert self.may_end.wait(20)
        raise StaleTurnError("turn 2 cannot follow turn 2")

    def close(self):
        pass


def test_a_turn_that_lost_is_not_resumed_by_who_comes_while_it_is_saved(demo_lm):
    snapshot = demo_lm.new_state(1).snapshot()
    ours, theirs = (
        Conversation("text", RollingHash().then(text), Kept(snapshot), turn=2)
        for text in (b"ours", b"theirs")
    )
    store = SlowStore(theirs)
    settings = ServeSettings(session_store="s", session_secrets=(SECRET,))

    async def run():
        sessions = Sessions(settings, StateStore(1 << 20, 0), store)
        lease = await sessions.lease("key", demo_lm)
        keeping = asyncio.create_task(lease.keep(ours))
        await asyncio.sleep(0.05)
        keeping.cancel()  # its client has gone
        lease.release()
        next_one = asyncio.create_task(sessions.lease("key", demo_lm))
        await asyncio.sleep(0.05)
        store.may_end.set()
        found = await next_one
        assert found.conversation is theirs
        sessions.close()

    asyncio.run(run())


def test_a_client_may_say_which_turn_it_asks_for(servers):
    url = servers[0].url

    def at(turn, text=TURNS[0], session="turns"):
        headers = {"x-session-turn": turn} | ({"x-session-id": session} if session else {})
        body = {"messages": text, "max_tokens": 2, "temperature": 0}
        return httpx.post(url + CHAT, json=body, headers=headers)

    assert code(at("2")) == (409, "session_conflict")
    assert at("1").headers["x-session-turn"] == "1"
    assert code(at("1")) == (409, "session_conflict")  # sent again: it would be doubled
    assert at("2", TURNS[1]).headers["x-session-turn"] == "2"
    for wrong in ("", "x", "-1", "1" * 13):
        assert at(wrong).status_code == 400
    assert at("1", session=None).status_code == 400


def test_a_copy_in_memory_is_no_longer_resumed_than_one_in_the_store(
    demo_lm, tmp_path, monkeypatch
):
    with serving.server_thread(demo_lm, **shared(tmp_path, session_max_age=100.0)) as server:
        content(ask(server.url, "old", TURNS[0]))
        now = session_store.time.time()
        monkeypatch.setattr(session_store.time, "time", lambda: now + 150)
        assert code(ask(server.url, "old", TURNS[1])) == (410, "session_expired")
        assert code(httpx.get(f"{server.url}/v1/sessions/old")) == (410, "session_expired")


@pytest.mark.slow
def test_where_a_session_stands_is_told_while_it_is_answered(servers):
    content(ask(servers[0].url, "told", TURNS[0]))
    told = []
    client = threading.Thread(
        target=lambda: told.append(
            ask(servers[0].url, "told", TURNS[1], max_tokens=2000, ignore_eos=True)
        )
    )
    client.start()
    wait_until(lambda: servers[0].stats().active == 1)
    for server in servers:
        assert httpx.get(f"{server.url}/v1/sessions/told").json()["turn"] == 1
    client.join()
    assert told[0].status_code == 200
    assert httpx.get(f"{servers[1].url}/v1/sessions/told").json()["turn"] == 2
