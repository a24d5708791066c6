"""A store of parked sessions: sealed, bound to name, turn and bundle, one writer for each turn."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
import struct
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lminf_export import load
from lminf_export.errors import (
    ConfigError,
    InputError,
    ParkedSessionError,
    ParkingError,
    StaleTurnError,
)
from lminf_export.runtime.parking import folder_objects, seal, session_store
from lminf_export.runtime.parking.folder_objects import FolderObjects
from lminf_export.runtime.parking.parked import new_mark
from lminf_export.runtime.parking.session_store import SessionStore
from tests.support.tiny_bundle import TinyModel

SECRET = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


@pytest.fixture(scope="module")
def snapshot(demo_lm):
    state = demo_lm.new_state(1)
    demo_lm.forward([[1, 2, 3, 4, 5, 6, 7]], state)
    return replace(state.snapshot(), labels={"of": "tests"}, unread=(9,))


@pytest.fixture(params=["folder", "memory"])
def url(request, tmp_path):
    if request.param == "folder":
        yield str(tmp_path / "store")
    else:
        yield f"memory://{tmp_path.name}/store"
        fsspec.filesystem("memory").store.clear()


def the_file(folder):
    (found,) = [path for path in folder.rglob("[0-9]*") if path.is_file()]
    return found


def is_equal(first, second):
    return (
        first.unread == second.unread
        and first.labels == second.labels
        and all(np.array_equal(first.caches[name], second.caches[name]) for name in first.caches)
    )


def test_a_session_is_resumed_by_another_server(url, demo_lm, snapshot):
    store = SessionStore(url, [SECRET])
    assert (store.latest("a"), store.load("a", demo_lm)) == (0, None)
    store.save("a", 1, snapshot)
    other = SessionStore(url, [SECRET])
    found = other.load("a", demo_lm)
    assert found.turn == other.latest("a") == 1
    assert is_equal(found.snapshot, snapshot)
    other.save("a", 2, replace(snapshot, unread=()))
    assert store.latest("a") == 2
    assert store.load("a", demo_lm).snapshot.unread == ()
    assert store.load("b", demo_lm) is None


def test_of_two_that_save_a_turn_one_is_told(url, snapshot):
    first, second = SessionStore(url, [SECRET]), SessionStore(url, [SECRET])
    first.save("a", 1, snapshot)
    with pytest.raises(StaleTurnError):
        second.save("a", 1, snapshot)
    first.save("a", 2, snapshot)
    first.save("a", 3, snapshot)
    with pytest.raises(StaleTurnError, match="turn 2 cannot follow turn 3"):
        second.save("a", 2, snapshot)
    with pytest.raises(StaleTurnError):
        second.save("never", 2, snapshot)


def test_of_many_at_once_exactly_one_saves_a_turn(tmp_path, snapshot):
    stores = [SessionStore(tmp_path, [SECRET]) for _ in range(8)]
    for turn in range(1, 11):
        results = []

        def save(store, turn=turn, results=results):
            try:
                store.save("a", turn, snapshot)
                results.append(True)
            except StaleTurnError:
                results.append(False)

        threads = [threading.Thread(target=save, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [False] * 7 + [True]
    assert the_file(tmp_path).name == "000000000010"


def test_a_copy_is_known_by_its_mark(tmp_path, demo_lm, snapshot):
    """Somebody empties the store, and the session begins again: its numbers are the same."""
    store = SessionStore(tmp_path, [SECRET])
    marks = [new_mark() for _ in range(2)]
    for number, mark in enumerate(marks, 1):
        store.save("a", number, snapshot, mark=mark)
        assert store.load("a", demo_lm).mark == mark
        assert store.is_latest("a", number, mark)
    assert not store.is_latest("a", 1, marks[0])
    assert not store.is_latest("b", 2, marks[1])
    the_file(tmp_path).unlink()
    assert not store.is_latest("a", 2, marks[1])
    for number in (1, 2):
        store.save("a", number, snapshot)
    assert store.latest("a") == 2
    assert not store.is_latest("a", 2, marks[1])
    found = store.load("a", demo_lm).mark
    assert store.is_latest("a", 2, found)
    the_file(tmp_path).write_bytes(b"lminf-parked")
    assert not store.is_latest("a", 2, found)
    for turn, mark in ((0, found), (2, "x"), (2, None), (2, found.upper() + "\n")):
        with pytest.raises(InputError):
            store.is_latest("a", turn, mark)


def test_a_dropped_session_does_not_come_back(url, demo_lm, snapshot):
    store, other = SessionStore(url, [SECRET]), SessionStore(url, [SECRET])
    assert not store.drop("a")
    assert store.latest("a") == 0
    store.save("a", 1, snapshot)
    assert other.drop("a")
    assert not other.drop("a")
    assert store.load("a", demo_lm) is None
    with pytest.raises(StaleTurnError):
        store.save("a", 2, snapshot)  # of an answer that began before
    store.save("a", store.latest("a") + 1, snapshot)
    assert store.load("a", demo_lm).turn == 3


def test_a_secret_can_be_replaced(tmp_path, demo_lm, snapshot):
    SessionStore(tmp_path, [SECRET]).save("a", 1, snapshot)
    assert SessionStore(tmp_path, [OTHER]).load("a", demo_lm) is None
    both = SessionStore(tmp_path, [OTHER, SECRET])
    assert both.load("a", demo_lm).turn == 1
    both.save("a", 2, snapshot)
    assert SessionStore(tmp_path, [SECRET]).load("a", demo_lm) is None
    assert SessionStore(tmp_path, [OTHER]).load("a", demo_lm).turn == 2


def test_no_server_loses_a_session_while_the_secret_is_replaced(tmp_path, demo_lm, snapshot):
    """The steps that docs/scaling.md names, each with servers before it and behind it."""
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "a file of two lines, the new one second" in page
    old, new, turn = SECRET, OTHER, 0
    steps = [[old], [old, new], [new, old]]
    for before, behind in itertools.pairwise(steps):
        for secrets in (before, behind, before, behind):
            store = SessionStore(tmp_path, secrets)
            if turn:
                assert store.load("a", demo_lm).turn == turn
            turn += 1
            store.save("a", turn, snapshot)
    assert SessionStore(tmp_path, [new]).load("a", demo_lm).turn == turn


def test_names_of_files_tell_nothing(tmp_path, snapshot):
    SessionStore(tmp_path, [SECRET]).save("a name", 1, snapshot)
    path = the_file(tmp_path)
    assert b"a name" not in path.read_bytes()
    assert "name" not in str(path.relative_to(tmp_path))
    assert path.stat().st_mode & 0o777 == 0o600
    for folder in (path.parent, path.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def reason_of(store, lm, name="a"):
    with pytest.raises(ParkedSessionError) as caught:
        store.load(name, lm)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_an_object_elsewhere_is_foreign(tmp_path, demo_lm, snapshot):
    store = SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)
    mine = the_file(tmp_path)
    store.save("b", 1, snapshot)
    (theirs,) = [path for path in tmp_path.rglob("0*") if path.is_file() and path != mine]
    mine.write_bytes(theirs.read_bytes())
    assert reason_of(store, demo_lm) == "foreign"
    # An earlier turn under a later one's name.
    theirs.rename(theirs.with_name("000000000002"))
    assert reason_of(store, demo_lm, "b") == "foreign"


def test_a_session_of_another_bundle_is_foreign(tmp_path, demo_lm, snapshot):
    other = load(TinyModel().write(tmp_path / "other").path, threads=1)
    store = SessionStore(tmp_path / "store", [SECRET])
    state = other.new_state(1)
    other.forward([[1, 2, 3]], state)
    store.save("a", 1, state.snapshot())
    assert reason_of(store, demo_lm) == "foreign"
    # A state that is larger than any of the other bundle is foreign, too, and is not read.
    store.save("c", 1, snapshot)
    assert reason_of(store, other, "c") == "foreign"
    # Of the same shapes, with other weights.
    store.save("b", 1, replace(snapshot, state_id="0" * 64))
    assert reason_of(store, demo_lm, "b") == "foreign"


def test_an_old_session_has_expired_and_is_swept_later(tmp_path, demo_lm, snapshot, monkeypatch):
    store = SessionStore(tmp_path, [SECRET], max_age=100)
    store.save("a", 1, snapshot)
    now = time.time()
    monkeypatch.setattr(session_store.time, "time", lambda: now + 99)
    assert store.load("a", demo_lm).turn == 1
    monkeypatch.setattr(session_store.time, "time", lambda: now + 102)
    with pytest.raises(
        ParkedSessionError, match=r"parked 102\.\d seconds ago, and is kept for 100"
    ):
        store.load("a", demo_lm)
    assert reason_of(store, demo_lm) == "expired"
    # A server whose clock is wrong refuses what is not old, and removes nothing.
    monkeypatch.setattr(session_store.time, "time", lambda: now + 10**7)
    assert store.sweep() == 0
    stranger, left = tmp_path / "kept.txt", the_file(tmp_path).with_name(".part-0123")
    stranger.write_text("not ours")
    left.write_bytes(b"of a crash")
    for path, age in ((the_file(tmp_path), 199), (stranger, 10**7), (left, 3500)):
        os.utime(path, (now - age, now - age))
    assert store.sweep() == 0
    for path, age in ((the_file(tmp_path), 202), (left, 3700)):
        os.utime(path, (now - age, now - age))
    assert store.sweep() == 2
    assert store.load("a", demo_lm) is None
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "kept.txt", ".lminf-store",
    }  # fmt: skip


def test_a_store_that_is_not_there_is_not_an_empty_one(tmp_path, demo_lm, snapshot):
    """Its file system was unmounted: what is under it is an empty folder, or none."""
    place, away = tmp_path / "store", tmp_path / "away"
    store = SessionStore(place, [SECRET])
    store.save("a", 1, snapshot)
    place.rename(away)
    for is_folder in (False, True):
        if is_folder:
            place.mkdir()
        for call in (
            lambda: store.latest("a"),
            lambda: store.load("a", demo_lm),
            lambda: store.is_latest("a", 1, new_mark()),
            lambda: store.save("a", 2, snapshot),
            lambda: store.save("b", 1, snapshot),
            lambda: store.drop("a"),
            store.sweep,
        ):
            with pytest.raises(ParkingError, match="not the one that was opened"):
                call()
    assert list(place.iterdir()) == []
    place.rmdir()
    away.rename(place)
    assert store.load("a", demo_lm).turn == 1
    assert SessionStore(place, [SECRET]).load("a", demo_lm).turn == 1
    (place / ".lminf-store").write_text("")
    with pytest.raises(InputError, match="is damaged"):
        SessionStore(place, [SECRET])


def test_what_is_no_file_is_damaged_and_can_be_dropped(tmp_path, demo_lm, snapshot, monkeypatch):
    def pipe(path):
        os.mkfifo(path)

    def link(path):
        path.symlink_to("/etc/passwd")

    store = SessionStore(tmp_path, [SECRET])
    store.save("folder", 1, snapshot)
    folder = the_file(tmp_path).parent

    def plug(path):
        with closing(socket.socket(socket.AF_UNIX)) as made:
            monkeypatch.chdir(path.parent)  # a socket's path is short
            made.bind(path.name)

    for number, make in enumerate((os.mkdir, pipe, link, plug)):
        before = len(os.listdir("/proc/self/fd"))
        turn = 10 * number + 9
        make(folder / f"{turn:012d}")
        assert reason_of(store, demo_lm, "folder") == "damaged"
        with pytest.raises(StaleTurnError):
            store.save("folder", turn, snapshot)
        assert not store.is_latest("folder", turn, "0" * 16)
        assert len(os.listdir("/proc/self/fd")) == before
        assert store.drop("folder")
        assert store.load("folder", demo_lm) is None
        assert len(list(folder.iterdir())) == 1


def test_a_folder_in_which_everybody_may_write_is_told(tmp_path, caplog):
    SessionStore(tmp_path / "own", [SECRET])
    assert not caplog.text
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    SessionStore(place, [SECRET])
    assert "every user of this machine may write there" in caplog.text


def test_keys_in_a_url_are_not_shown():
    for url in ("https://name:TOPSECRET@host/x", "s3://name:TOPSECRET@bucket"):
        with pytest.raises(InputError, match="keys in a URL") as caught:
            SessionStore(url, [SECRET])
        assert "TOPSECRET" not in str(caught.value)


def test_what_stands_in_place_of_a_session_s_folder_is_damaged_and_can_be_dropped(
    tmp_path, demo_lm, snapshot
):
    store, elsewhere = SessionStore(tmp_path / "store", [SECRET]), tmp_path / "elsewhere"
    store.save("a", 1, snapshot)
    folder = the_file(tmp_path / "store").parent
    shutil.copytree(folder, elsewhere)

    def link(path):
        path.symlink_to(elsewhere)

    for make in (link, os.mkfifo, lambda path: path.write_text("a")):
        shutil.rmtree(folder)
        make(folder)
        assert reason_of(store, demo_lm, "a") == "damaged"
        assert not store.is_latest("a", 1, "0" * 16)
        assert store.drop("a")
        assert not folder.is_symlink()
        assert store.load("a", demo_lm) is None
        assert store.latest("a") == 2
    assert len(os.listdir(elsewhere)) == 1
    shutil.rmtree(folder.parent)
    folder.parent.write_text("")
    with pytest.raises(ParkingError, match="Not a directory"):
        store.load("a", demo_lm)


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, snapshot, monkeypatch):
    """Between the two looks of `mkdir` a sweep may remove an empty folder."""
    store, gone, mkdir = SessionStore(tmp_path, [SECRET]), [], os.mkdir

    def racing(path, *arguments, **named):
        if len(Path(path).name) == 64 and len(gone) < 3:
            gone.append(path)
            raise FileExistsError(17, "File exists", str(path))
        return mkdir(path, *arguments, **named)

    monkeypatch.setattr(os, "mkdir", racing)
    store.save("a", 1, snapshot)
    assert len(gone) == 3
    assert store.latest("a") == 1


def test_a_turn_that_is_removed_while_it_is_stored_is_stale(tmp_path, snapshot, monkeypatch):
    store, sync = SessionStore(tmp_path, [SECRET]), folder_objects.sync

    def removed_before(path):
        if len(path.name) == 64:
            shutil.rmtree(path)
        sync(path)

    monkeypatch.setattr(folder_objects, "sync", removed_before)
    with pytest.raises(StaleTurnError):
        store.save("a", 1, snapshot)


def test_a_turn_follows_only_the_one_before(url, snapshot):
    """A server that went on from turn 4 of a store which was emptied knows another session."""
    store = SessionStore(url, [SECRET])
    for turn in (1, 3, 5):
        with suppress(StaleTurnError):
            store.save("a", turn, snapshot)
        assert store.latest("a") == 1


@pytest.mark.parametrize("turn", ["9" * 12, "9" * 11 + "8"])
def test_a_turn_beyond_all_numbers_can_be_dropped(tmp_path, demo_lm, snapshot, turn):
    store = SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)
    found = the_file(tmp_path)
    found.rename(found.with_name(turn))
    assert reason_of(store, demo_lm) == "foreign"
    assert store.drop("a")
    assert not store.drop("a")
    store.save("a", 1, snapshot)
    assert store.load("a", demo_lm).turn == 1


def test_a_sweep_follows_no_link_and_stops_at_nothing(tmp_path, demo_lm, snapshot):
    store = SessionStore(tmp_path / "store", [SECRET], max_age=1)
    store.save("a", 1, snapshot)
    old = time.time() - 7200
    turn = the_file(tmp_path / "store")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ("0" * 12)).write_bytes(b"of somebody else")
    (turn.parent.parent / ("0" * 64)).symlink_to(elsewhere)
    stuck = turn.parent / ("0" * 11 + "9")
    (stuck / "inside").mkdir(parents=True)
    left = tmp_path / "store" / ".part-0123"
    left.write_bytes(b"of a crash")
    for path in (turn, stuck, left, elsewhere / ("0" * 12)):
        os.utime(path, (old, old))
    assert store.sweep() == 2  # the turn, and what was left
    assert stuck.is_dir()
    assert (elsewhere / ("0" * 12)).is_file()
    assert not left.exists()


def test_a_session_that_goes_on_while_it_is_dropped_is_dropped(
    tmp_path, demo_lm, snapshot, monkeypatch
):
    """Another server saves its next turn between looking and reading."""
    store, other = SessionStore(tmp_path, [SECRET]), SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)
    monkeypatch.setattr(session_store, "OVERHEAD", 1 << 30)  # any turn could be a dropped one
    read, saved = FolderObjects.read, []

    def slow(self, key, found):
        if not saved:
            saved.append(True)
            other.save("a", 2, snapshot)
        return read(self, key, found)

    monkeypatch.setattr(FolderObjects, "read", slow)
    assert store.drop("a")
    assert store.load("a", demo_lm) is None


def test_a_full_store_can_be_emptied(tmp_path, demo_lm, snapshot, monkeypatch):
    store = SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)

    def full(*_):
        raise ParkingError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(FolderObjects, "create", full)
        assert store.drop("a")
        assert store.load("a", demo_lm) is None
    with pytest.raises(StaleTurnError):
        store.save("a", 2, snapshot)  # of a server that was answering it
    store.save("a", 1, snapshot)


def test_a_long_system_message_is_stored(tmp_path, demo_lm, snapshot):
    store = SessionStore(tmp_path, [SECRET])
    text = json.dumps({"system": "\U0001f600" * 2**16})
    store.save("a", 1, replace(snapshot, labels={"record": text}))
    assert store.load("a", demo_lm).snapshot.labels["record"] == text


def test_a_sealed_lie_is_refused_too(tmp_path, demo_lm, snapshot):
    """A server of the fleet that is broken seals something that is no state."""
    store, secret = SessionStore(tmp_path, [SECRET]), seal.Secret(SECRET)
    store.save("a", 1, snapshot)
    header, state = seal.unsealed(secret, the_file(tmp_path).read_bytes())
    for content in (b"", b"\0" * 100, bytes(state[:-1]), bytes(state) + b"\0"):
        lie = replace(header, nbytes=len(content), sha256=seal.digest(content))
        the_file(tmp_path).write_bytes(seal.sealed(secret, lie, content))
        if content:
            assert reason_of(store, demo_lm) == "damaged"
        else:
            assert store.load("a", demo_lm) is None


def test_no_changed_object_is_resumed(tmp_path, demo_lm, snapshot):
    store = SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)
    path = the_file(tmp_path)
    good = path.read_bytes()
    header_end = good.index(b"lminf-state")
    rng = random.Random(0)
    for number in range(2000):
        data = bytearray(good)
        kind = number % 4
        # Half of the changes are in the header, which is small.
        place = rng.randrange(header_end if number % 8 < 4 else len(good))
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 64))
        else:
            size = rng.randint(1, 64)
            data[place : place + size] = rng.randbytes(size)
        if bytes(data) == good:
            continue
        path.write_bytes(data)
        assert reason_of(store, demo_lm) == "damaged"
    path.write_bytes(good)
    assert store.load("a", demo_lm).turn == 1


def test_a_huge_object_is_not_read(tmp_path, demo_lm, snapshot):
    store = SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)
    os.truncate(the_file(tmp_path), 2**40)  # a hole
    started = time.monotonic()
    assert reason_of(store, demo_lm) == "damaged"
    assert time.monotonic() - started < 1


def test_a_header_is_read_only_when_its_seal_fits(tmp_path, demo_lm, snapshot, monkeypatch):
    store = SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)
    path = the_file(tmp_path)
    text = json.dumps({"format": 1, "key": "x" * 3000}).encode()
    path.write_bytes(seal._MAGIC + struct.pack("<I", len(text)) + text + b"\0" * 32)

    def parsed(text):
        raise AssertionError("parsed before its seal was checked")

    monkeypatch.setattr(seal, "parse_json", parsed)
    assert reason_of(store, demo_lm) == "damaged"


def test_links_are_not_followed(tmp_path, demo_lm, snapshot):
    store = SessionStore(tmp_path / "store", [SECRET])
    store.save("a", 1, snapshot)
    path = the_file(tmp_path / "store")
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert reason_of(store, demo_lm) == "damaged"
    path.unlink()
    os.mkfifo(path)
    assert reason_of(store, demo_lm) == "damaged"  # and does not wait


def test_what_cannot_be_stored_is_refused(tmp_path, demo_lm, snapshot):
    store = SessionStore(tmp_path, [SECRET])
    two = demo_lm.new_state(2)
    demo_lm.forward([[1], [2]], two)
    with pytest.raises(InputError, match="one stream"):
        store.save("a", 1, two.snapshot())
    with pytest.raises(InputError, match="labels"):
        store.save("a", 1, replace(snapshot, labels={"a": "b" * 2**21}))
    with pytest.raises(InputError, match="turn"):
        store.save("a", 0, snapshot)
    for name in ("", 5, "x" * 5000):
        with pytest.raises(InputError, match="name"):
            store.save(name, 1, snapshot)
    assert not [path for path in tmp_path.rglob("[0-9]*") if path.is_file()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, snapshot):
    store = SessionStore(tmp_path, [SECRET])
    tmp_path.chmod(0o500)
    with pytest.raises(ParkingError, match="Permission denied"):
        store.save("a", 1, snapshot)


def test_a_full_disk_leaves_the_session_where_it_stood(tmp_path, demo_lm, snapshot, monkeypatch):
    store = SessionStore(tmp_path, [SECRET])
    store.save("a", 1, snapshot)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ParkingError, match="No space left"):
        store.save("a", 2, snapshot)
    monkeypatch.setattr(folder_objects, "sync", lambda _: None)
    with pytest.raises(ParkingError, match="No space left"):
        store.save("b", 1, snapshot)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*/*"))) == 1
    assert store.load("a", demo_lm).turn == 1
    assert the_file(tmp_path).name == "000000000001"
    assert len(list(the_file(tmp_path).parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("", InputError, "expected a folder, or a URL"),
        ("nothing://bucket", InputError, "no writes that replace nothing"),
        ("ftp://host/folder", InputError, "no writes that replace nothing"),
        ("s3://key:secret@bucket", InputError, "keys in a URL"),
        ("abfs://name:key@account/p", InputError, "keys in a URL"),
        ("/proc/nothing/here", InputError, "session store /proc/nothing/here: "),
        (5, InputError, "expected a folder, or a URL"),
        ("a\nb", InputError, "expected a folder, or a URL"),
    ],
)
def test_a_place_that_is_no_store_is_named(place, error, words):
    with pytest.raises(error, match=words) as caught:
        SessionStore(place, [SECRET])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "secrets",
    [[], "a" * 64, ["short"], [SECRET + "\n" + OTHER], [" " * 40], [b"a" * 64], [5], None],
)
def test_secrets_are_checked(tmp_path, secrets):
    with pytest.raises(ConfigError, match="secret"):
        SessionStore(tmp_path / "store", secrets)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("age", [0, -1, float("inf"), float("nan"), "long"])
def test_an_age_is_checked(tmp_path, age):
    with pytest.raises(ConfigError, match="max_age"):
        SessionStore(tmp_path, [SECRET], max_age=age)


def test_a_slow_server_does_not_win_over_a_later_turn(url, demo_lm, snapshot, monkeypatch):
    """It saw turn 1, and creates turn 2 when the others have gone on to turn 3."""
    slow, fast = SessionStore(url, [SECRET]), SessionStore(url, [SECRET])
    fast.save("a", 1, snapshot)
    create = slow._objects.create

    def late(*arguments):
        fast.save("a", 2, snapshot)
        fast.save("a", 3, replace(snapshot, unread=(5,)))
        create(*arguments)

    monkeypatch.setattr(slow._objects, "create", late)
    with pytest.raises(StaleTurnError, match="came behind"):
        slow.save("a", 2, snapshot)
    assert fast.load("a", demo_lm).snapshot.unread == (5,)
    key = seal.Secret(SECRET).key("a")
    assert [found.turn for found in fast._objects.turns(key)] == [3]


def test_servers_with_the_secrets_in_another_order_do_not_fork_a_session(
    url, demo_lm, snapshot, monkeypatch
):
    one, two = SessionStore(url, [OTHER, SECRET]), SessionStore(url, [SECRET, OTHER])
    one.save("a", 1, snapshot)
    create = two._objects.create

    def together(*arguments):
        one.save("a", 2, replace(snapshot, unread=(5,)))
        create(*arguments)

    monkeypatch.setattr(two._objects, "create", together)
    with pytest.raises(StaleTurnError):
        two.save("a", 2, snapshot)
    for store in (one, two):
        found = store.load("a", demo_lm)
        assert (found.turn, found.snapshot.unread) == (2, (5,))


def behind_the_first_look(store, monkeypatch, act):
    """Let another server act when a store has looked at the first of its keys."""
    look = store._objects.turns

    def turns(key):
        found = look(key)
        monkeypatch.setattr(store._objects, "turns", look)
        act()
        return found

    monkeypatch.setattr(store._objects, "turns", turns)


def test_a_turn_that_a_later_one_has_removed_is_stale(url, snapshot, monkeypatch):
    """Three servers while a secret is replaced: of turn 2 there were two, and then a third."""
    mine, theirs = (SessionStore(url, secrets) for secrets in ([OTHER, SECRET], [SECRET, OTHER]))
    later = SessionStore(url, [OTHER, SECRET])
    theirs.save("a", 1, snapshot)
    create = mine._objects.create

    def second(*arguments):
        theirs.save("a", 2, snapshot)
        create(*arguments)
        behind_the_first_look(mine, monkeypatch, lambda: later.save("a", 3, snapshot))

    monkeypatch.setattr(mine._objects, "create", second)
    with pytest.raises(StaleTurnError):
        mine.save("a", 2, snapshot)
    assert later.latest("a") == 3


def test_a_session_that_gets_its_name_of_the_new_secret_is_found_meanwhile(
    url, demo_lm, snapshot, monkeypatch
):
    SessionStore(url, [SECRET]).save("a", 1, snapshot)
    reader, other = (SessionStore(url, [OTHER, SECRET]) for _ in range(2))
    behind_the_first_look(reader, monkeypatch, lambda: other.save("a", 2, snapshot))
    assert reader.load("a", demo_lm).turn == 2


def test_a_reply_that_is_lost_is_no_failure(url, demo_lm, snapshot, monkeypatch):
    store = SessionStore(url, [SECRET])
    create = store._objects.create
    errors = [ParkingError("the connection broke"), StaleTurnError("asked twice")]

    def unheard(*arguments):
        create(*arguments)
        raise errors.pop()

    with monkeypatch.context() as patched:
        patched.setattr(store._objects, "create", unheard)
        for turn in (1, 2):
            store.save("a", turn, snapshot)
    assert store.load("a", demo_lm).turn == 2


def test_earlier_turns_that_cannot_be_removed_are_no_failure(
    url, demo_lm, snapshot, monkeypatch, caplog
):
    store = SessionStore(url, [SECRET])
    store.save("a", 1, snapshot)

    def refused(*_):
        raise ParkingError("not allowed")

    monkeypatch.setattr(store._objects, "remove", refused)
    store.save("a", 2, snapshot)
    assert "not allowed" in caplog.text
    monkeypatch.undo()
    assert store.load("a", demo_lm).turn == 2
    store.save("a", 3, snapshot)
    key = seal.Secret(SECRET).key("a")
    assert [found.turn for found in store._objects.turns(key)] == [3]


@pytest.mark.parametrize(
    "place",
    [
        "S3://bucket",
        "s3:/bucket",
        "simplecache::s3://bucket",
        "file://",
        "file://here",
        "local://x",
        "s3:bucket",
        "s3://[x",
        "gs://@[/",
    ],
)
def test_what_is_meant_as_a_url_becomes_no_folder(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"expected|keys in a URL"):
        SessionStore(place, [SECRET])
    assert not list(tmp_path.iterdir())


def test_a_store_that_replaces_objects_is_refused(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    def replacing(self, path, value, mode="overwrite", **_):
        self.open(path, mode="wb", data=value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", replacing)
    with pytest.raises(ParkingError, match="conditional writes"):
        SessionStore(f"memory://{tmp_path.name}/store", [SECRET])


def test_the_program_that_the_documentation_shows_goes_on_where_it_stood(
    tmp_path, monkeypatch, demo_bundle, demo_lm, capsys
):
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    program = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("demo").symlink_to(demo_bundle)
    Path("session-secret").write_text(SECRET + "\n")
    for turn in (1, 2):
        exec(compile(program, "scaling.md", "exec"), {})
        # The same secret, as a server reads it: without the newline.
        parked = SessionStore("sessions", [SECRET]).load("tea-time", demo_lm)
        assert parked.turn == turn
    ids = demo_lm.codec.encode("It is a truth")
    state = demo_lm.new_state()
    for _ in range(2):
        list(demo_lm.generate(ids, max_new_tokens=12, state=state))
    assert is_equal(parked.snapshot, state.snapshot())
    assert SessionStore("sessions", [SECRET]).drop("tea-time")
    exec(compile(program, "scaling.md", "exec"), {})
    assert SessionStore("sessions", [SECRET]).latest("tea-time") == 4
    assert not capsys.readouterr().out
