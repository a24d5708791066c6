"""`lminf generate --save-state/--load-state`: two runs write what one would."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

from lminf_export.cli.kept_state import KeptState
from lminf_export.cli.main import cli
from lminf_export.runtime.load import load
from tests.support.pseudo_terminal import PseudoTerminal
from tests.support.signals import default_signals
from tests.support.tiny_bundle import TinyModel

LMINF = [sys.executable, "-m", "lminf_export.cli.main"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return TinyModel().write(tmp_path_factory.mktemp("b") / "tiny").path


def generate(bundle, *arguments):
    line = ["generate", bundle, "--threads", 1, "--ignore-eos", *arguments]
    return CliRunner().invoke(cli, [str(argument) for argument in line])


def text(bundle, *arguments):
    result = generate(bundle, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.removesuffix("\n")


def refused(result):
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("prompt", ["Hello", "日本語", "é", "ab\n"])
def test_two_runs_write_what_one_writes(bundle, tmp_path, prompt):
    """Random weights write bytes that are no characters, and characters in several tokens."""
    path = tmp_path / "s"
    for first in (0, 1, 2, 3, 5, 8, 40):
        whole = text(bundle, "--prompt", prompt, "--max-new-tokens", first + 12)
        parts = text(bundle, "--prompt", prompt, "--max-new-tokens", first, "--save-state", path)
        parts += text(bundle, "--load-state", path, "--max-new-tokens", 5, "--save-state", path)
        parts += text(bundle, "--load-state", path, "--max-new-tokens", 7)
        assert parts == whole


def test_a_prompt_comes_behind_what_was_saved(bundle, tmp_path):
    path = tmp_path / "s"
    first = generate(
        bundle, "--prompt", "One", "--max-new-tokens", 4, "--save-state", path, "--json"
    )
    ids = json.loads(first.stdout)["token_ids"]
    second = generate(
        bundle, "--load-state", path, "--prompt", " two", "--max-new-tokens", 9, "--json"
    )
    lm = load(bundle, threads=1)
    given = [*lm.codec.encode("One"), *ids, *lm.codec.ids(" two")]
    wanted = list(lm.generate(given, max_new_tokens=9, stop_token_ids=()))
    assert json.loads(second.stdout)["token_ids"] == wanted
    assert json.loads(first.stdout)["state_bytes"] == path.stat().st_size
    assert json.loads(second.stdout)["state_bytes"] is None


def test_a_prompt_that_is_only_read_is_kept_too(bundle, tmp_path):
    path = tmp_path / "s"
    text(bundle, "--prompt", "x" * 99, "--max-new-tokens", 0, "--save-state", path)
    lm = load(bundle, threads=1)
    assert lm.load_state(path).furthest == 98
    assert len(lm.load_snapshot(path).unread) == 1


def test_statistics_say_how_large_the_state_is(bundle, tmp_path):
    arguments = ("--prompt", "x", "--max-new-tokens", 3, "--stats")
    assert "state" not in generate(bundle, *arguments).stderr
    assert ", state " in generate(bundle, *arguments, "--save-state", tmp_path / "s").stderr


def test_what_cannot_be_loaded_or_saved_is_one_line(bundle, tmp_path):
    path = tmp_path / "s"
    prompt = ("--prompt", "x", "--max-new-tokens", 1)
    assert "no such file" in refused(generate(bundle, "--load-state", path)).lower()
    for place in (tmp_path, tmp_path / "missing" / "s", tmp_path / ("n" * 400)):
        refused(generate(bundle, *prompt, "--save-state", place))
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"x" * 100)
    assert "damaged" in refused(generate(bundle, *prompt, "--load-state", path))
    assert path.read_bytes() == b"x" * 100
    lm = load(bundle, threads=1)
    state = lm.new_state(2)
    state.save(path)
    assert "2 streams" in refused(generate(bundle, *prompt, "--load-state", path))
    lm.prime([5, 6]).save(path)
    assert "give a prompt" in refused(generate(bundle, "--load-state", path))
    other = TinyModel(seed=1).write(tmp_path / "other").path
    assert "another bundle" in refused(generate(other, *prompt, "--load-state", path))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, None])
def test_an_interrupted_text_goes_on(bundle, tmp_path, sent):
    """None: its reader goes away."""
    path = tmp_path / "s"
    command = [sys.executable, "-m", "lminf_export.cli.main", "generate", str(bundle)]
    command += ["--threads", "1", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, "--prompt", "Hi", "--endless", "--save-state", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # `communicate` does not see what a buffer has read
        preexec_fn=default_signals,
    )
    first = process.stdout.read(1)
    time.sleep(0.2)
    if sent is None:
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
    else:
        process.send_signal(sent)
        rest, messages = process.communicate(timeout=60)
        assert process.returncode == 130
        assert messages.strip().endswith(b"the state is saved")
    lm = load(bundle, threads=1)
    snapshot = lm.load_snapshot(path)
    count = int(snapshot.past_length[0]) + len(snapshot.unread) - len(lm.codec.encode("Hi"))
    whole = text(bundle, "--prompt", "Hi", "--max-new-tokens", count + 30)
    if sent is None:
        assert count > 0
        assert whole.endswith(text(bundle, "--load-state", path, "--max-new-tokens", 30))
        return
    written = (first + rest).decode().removesuffix("\n")
    assert written + text(bundle, "--load-state", path, "--max-new-tokens", 30) == whole


def test_a_closed_terminal_saves_the_stream(bundle, tmp_path):
    for number, end in enumerate((["--prompt", "Hi", "--endless"], ["--follow"])):
        path = tmp_path / f"s{number}"
        command = [*LMINF, "generate", str(bundle), "--threads", "1", "--ignore-eos", *end]
        with PseudoTerminal([*command, "--save-state", str(path)]) as terminal:
            if "--follow" in end:
                terminal.keys("One\n")
            while len(terminal.shown) < 10:
                assert terminal._read(30)
            terminal.close()
            assert terminal.child.wait(30) in (2, 130)
        assert load(bundle, threads=1).load_snapshot(path).furthest > 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
@pytest.mark.parametrize("follow", [False, True])
def test_a_full_disk_behind_stdout_does_not_cost_the_stream(bundle, tmp_path, follow):
    path = tmp_path / "s"
    options = ["--follow"] if follow else ["--prompt", "Hi"]
    command = [*LMINF, "generate", str(bundle), *options, "--save-state", str(path)]
    with open("/dev/full", "wb") as full:
        told = subprocess.run(
            [*command, "--max-new-tokens", "5"],
            input=b"One\n", stdout=full, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    assert told.returncode == 2
    assert told.stderr == b"error: No space left on device\n"
    assert load(bundle, threads=1).load_snapshot(path).furthest > 1


@pytest.mark.parametrize("pause", [0.001, 0.003, 0.006, 0.012])
def test_signals_that_come_together_are_one(bundle, tmp_path, pause):
    path = tmp_path / "s"
    process = subprocess.Popen(
        [*LMINF, "generate", str(bundle), "--prompt", "Hi", "--endless", "--ignore-eos",
         "--save-state", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default_signals,
    )  # fmt: skip
    process.stdout.read(1)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(pause)
    _, messages = process.communicate(timeout=60)
    assert messages.strip().endswith(b"the state is saved")
    load(bundle, threads=1).load_snapshot(path)


def test_a_signal_behind_the_last_words_says_nothing_more(bundle, tmp_path, monkeypatch):
    """The handlers of before are back, and the program has not ended yet."""

    def restored(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(KeptState, "watch", restored)  # at its first token
    monkeypatch.setattr("lminf_export.cli.signals._Handlers.restore", restored)
    told = generate(bundle, "--prompt", "Hi", "--save-state", tmp_path / "s")
    assert told.exit_code == 130
    assert told.stderr.strip().endswith("the state is saved")


def test_text_held_back_for_a_stop_string_is_shown_at_an_interrupt(bundle, tmp_path, monkeypatch):
    path = tmp_path / "s"
    whole = text(bundle, "--prompt", "Hi", "--max-new-tokens", 40)
    watch = KeptState.watch

    def interrupted(kept, token_ids):
        yield from itertools.islice(watch(kept, token_ids), 20)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptState, "watch", interrupted)
        stop = whole[:15] + "no such text"
        told = generate(bundle, "--prompt", "Hi", "--stop", stop, "--save-state", path)
    assert told.exit_code == 130
    parts = told.stdout.removesuffix("\n")
    assert parts
    assert parts + text(bundle, "--load-state", path, "--max-new-tokens", 20) == whole


def test_a_state_that_has_read_nothing_begins_a_text(bundle, tmp_path):
    path = tmp_path / "s"
    load(bundle, threads=1).new_state().save(path)
    new = text(bundle, "--prompt", "Hi", "--max-new-tokens", 9)
    assert text(bundle, "--load-state", path, "--prompt", "Hi", "--max-new-tokens", 9) == new


def test_a_stop_string_is_utf8_in_every_locale(bundle):
    command = [*LMINF, "generate", str(bundle), "--prompt", "Hi", "--json", "--max-new-tokens", "3"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for stop, code in (("é".encode(), 0), (b"\xff", 2)):
        told = subprocess.run(
            [*map(os.fsencode, command), b"--stop", stop],
            env=environment, capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        assert told.returncode == code, told.stderr
        assert code == 0 or b"--stop is not UTF-8" in told.stderr


def test_a_link_to_a_state_stays_one(bundle, tmp_path):
    path, link = tmp_path / "s", tmp_path / "link"
    link.symlink_to("s")
    text(bundle, "--prompt", "Hi", "--max-new-tokens", 3, "--save-state", link)
    assert link.is_symlink()
    assert path.is_file()


def test_the_context_of_a_file_is_that_of_its_text(bundle, tmp_path):
    path = tmp_path / "s"
    text(bundle, "--prompt", "y" * 100, "--max-new-tokens", 100, "--save-state", path)
    lm = load(bundle, threads=1)
    prompt = lm.codec.encode("y" * 100)
    whole = [*prompt, *lm.generate(prompt, max_new_tokens=100, stop_token_ids=())]
    snapshot = lm.load_snapshot(path)
    assert [*snapshot.context, *snapshot.unread] == whole[-65:]
    np.testing.assert_array_equal(snapshot.past_length, [199])
