"""`lminf generate --follow`: lines without end, whose arrival does not matter, in one state."""

from __future__ import annotations

import io
import itertools
import signal
import subprocess
import sys

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_export.cli.main import cli
from lminf_export.runtime import following as following_module
from lminf_export.runtime.following import MOST_LINE_BYTES, WRITE_AFTER, Following
from lminf_export.runtime.load import load
from tests.support.signals import default_signals
from tests.support.tiny_bundle import TinyModel

LMINF = [sys.executable, "-m", "lminf_export.cli.main"]
# The tiny model writes any bytes; these keep a line of it short.
SETTINGS = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return TinyModel().write(tmp_path_factory.mktemp("follow") / "tiny").path


@pytest.fixture(scope="module")
def lm(bundle):
    return load(bundle, threads=1)


class Pieces(io.RawIOBase):
    """Bytes that arrive a few at a time."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, itertools.cycle(sizes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = min(next(self._sizes), len(buffer), len(self._data))
        buffer[:size], self._data = self._data[:size], self._data[size:]
        return size


def written(lm, data, after="line", sizes=(MOST_LINE_BYTES,), **changed):
    following = Following(lm, "", after)
    lines = io.BufferedReader(Pieces(data, list(sizes)))
    return "".join(following.answers(lines, **{**SETTINGS, **changed})), following


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.sampled_from("aé中\n \r😀"), max_size=40),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    after=st.sampled_from(WRITE_AFTER),
)
def test_what_is_written_does_not_depend_on_how_the_text_arrives(text, sizes, after, lm):
    data = text.encode()
    first, _ = written(lm, data, after)
    second, _ = written(lm, data, after, sizes)
    assert second == first


def test_each_line_is_continued_behind_all_that_came_before(lm):
    text, following = written(lm, b"one\ntwo\n\nthree")
    ids, lines = [], []
    for line in ("one", "two", "", "three"):
        ids += lm.codec.encode(line) if line else []
        if line:
            answer = []
            for token in lm.generate(ids, **SETTINGS):
                answer.append(token)
                if "\n" in lm.codec.tokenizer.decode(answer):
                    break
            ids += answer
            lines.append(lm.codec.tokenizer.decode(answer).partition("\n")[0])
            newline = "\n" in lm.codec.tokenizer.decode(answer)
            ids += [] if newline else lm.codec.ids("\n")
        else:
            ids += lm.codec.ids("\n")
            lines.append("")
    assert text == "".join(f"{line}\n" for line in lines)
    assert following.stream.position == len(ids)
    assert following.num_lines == 4


@pytest.mark.parametrize(
    ("after", "answers"), [("line", 3), ("newline", 5), ("blank", 2), ("end", 1)]
)
def test_where_the_model_writes(after, answers, lm):
    _, following = written(lm, b"one\ntwo\n\n\nthree", after, max_new_tokens=1)
    assert following.num_written == answers
    assert following.num_lines == 5


def test_a_stop_text_and_the_prompt(lm):
    following = Following(lm, "Before\n")
    assert following.stream.position == len(lm.codec.encode("Before\n"))
    all_of_it = "".join(following.answers(io.BytesIO(b"one\n"), max_new_tokens=5))
    stop = all_of_it[2]
    again = Following(lm, "Before\n")
    text = "".join(again.answers(io.BytesIO(b"one\n"), stop=[stop], max_new_tokens=5))
    assert text == all_of_it.partition(stop)[0] + "\n"


def test_nothing_is_written_of_nothing(lm):
    for after in WRITE_AFTER:
        assert written(lm, b"", after)[0] == ""
    assert written(lm, b"\n\n", "blank")[0] == ""


def test_bytes_that_are_no_text_are_replaced(lm):
    bad, _ = written(lm, b"a\xff\xc3\nb\n")
    good, _ = written(lm, "a��\nb\n".encode())
    assert bad == good


@pytest.mark.slow
def test_a_line_without_end_takes_no_memory(lm):
    text = b"word " * (3 * MOST_LINE_BYTES // 5)
    following = Following(lm)
    pieces = following.answers(io.BytesIO(text + b"\nnext\n"), max_new_tokens=1)
    assert len(list(pieces)) >= 2
    assert following.num_lines == 2
    assert len(following.stream.unread) < 600
    assert following.stream.position > len(text)  # a token is a byte


@pytest.mark.slow
def test_the_memory_of_many_lines_is_that_of_few(lm):
    process, sizes = psutil.Process(), []
    following = Following(lm)

    class Lines(io.RawIOBase):
        """Lines that are made as they are read, and counted."""

        count = 0

        def readline(self, _=-1):
            self.count += 1
            if self.count in (1000, 4000):
                sizes.append(process.memory_info().rss)
            return b"2026-11-28 something happened again\n" if self.count <= 4000 else b""

    for _ in following.answers(Lines(), max_new_tokens=2):
        pass
    assert following.num_lines == 4000
    assert sizes[1] < sizes[0] * 1.02
    assert following.stream.state.nbytes == following.stream.state.max_nbytes


def lminf(*arguments, **options):
    return CliRunner().invoke(cli, [str(a) for a in arguments], **options)


def test_the_command_continues_lines(bundle, lm):
    options = ["--follow", "--max-new-tokens", 5, "--threads", 1]
    result = lminf("generate", bundle, *options, "--stats", input="one\ntwo\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == written(lm, b"one\ntwo\n")[0]
    assert "2 lines, " in result.stderr
    given = lminf("generate", bundle, *options, "--prompt", "Before\n", input="")
    assert (given.exit_code, given.stdout) == (0, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--follow", "-"], "reads stdin already"),
        (["--follow", "--prompt-file", "-"], "reads stdin already"),
        (["--follow", "--endless"], "neither --endless nor --json"),
        (["--follow", "--json"], "neither --endless nor --json"),
        (["--write-after", "line", "--prompt", "a"], "give both"),
        (["--follow", "--prompt", "a", "--prompt-file", "b"], "once"),
        (["--follow", "--top-p", 9], "top_p"),
        (["--follow", "--stop", ""], "empty"),
    ],
)
def test_options_that_do_not_go_together(options, words, bundle):
    result = lminf("generate", bundle, *options, input="a\n")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_stream_goes_on_where_it_was_saved(bundle, lm, tmp_path):
    options = ["--follow", "--max-new-tokens", 5, "--threads", 1]
    file = tmp_path / "stream.state"
    whole = lminf("generate", bundle, *options, input="one\ntwo\nthree\n").stdout
    first = lminf("generate", bundle, *options, "--save-state", file, input="one\ntwo\n")
    then = lminf("generate", bundle, *options, "--load-state", file, input="three\n")
    assert first.stdout + then.stdout == whole
    refused = lminf("generate", bundle, *options, "--save-state", tmp_path / "no" / "x", input="a")
    assert refused.exit_code == 2
    assert refused.stdout == ""


def test_lines_are_answered_as_they_come_and_ctrl_c_ends(bundle, lm, tmp_path):
    file = tmp_path / "stream.state"
    command = [*LMINF, "generate", str(bundle), "--follow", "--max-new-tokens", "3"]
    command += ["--save-state", str(file)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=default_signals,
    )
    with child:
        for line in (b"one\n", b"two\n"):
            child.stdin.write(line[:2])
            child.stdin.flush()
            child.stdin.write(line[2:])
            child.stdin.flush()
            assert child.stdout.readline().endswith(b"\n")
        child.send_signal(signal.SIGINT)
        _, words = child.communicate(timeout=30)
        assert child.returncode == 130
        assert b"interrupted: 2 lines" in words
    assert lm.load_state(file).furthest > len("one two")


@pytest.mark.parametrize("length", range(MOST_LINE_BYTES - 3, MOST_LINE_BYTES + 3))
def test_a_carriage_return_at_the_end_of_a_piece_is_the_line_s(lm, length):
    ends = {}
    for end in (b"\n", b"\r\n"):
        for text, ended in following_module._pieces(io.BytesIO(b"a" * length + end + b"b")):
            ends.setdefault(end, []).append((text, ended))
    joined = {end: "".join(text for text, _ in found) for end, found in ends.items()}
    assert joined[b"\n"] == joined[b"\r\n"] == "a" * length + "b"


@pytest.mark.parametrize("after", WRITE_AFTER)
def test_a_stream_that_is_cut_ends_what_it_wrote(lm, after):
    following = Following(lm, "", after)
    pieces = following.answers(io.BytesIO(b"One\n\nTwo\n\n"), max_new_tokens=50)
    next(pieces)
    before = following.stream.position
    pieces.close()
    following.end_writing()
    newline = lm.codec.ids_behind("\n", "\n")
    assert following.stream.position > before
    assert following.stream.unread[-len(newline) :] == newline
    ended = following.stream.position
    following.end_writing()  # once
    assert following.stream.position == ended


def test_behind_all_of_a_text_a_newline_stands_in_the_stream_too(lm):
    text, following = written(lm, b"One\nTwo\n", "end")
    assert text.endswith("\n")
    newline = lm.codec.ids_behind("\n", "\n")
    assert following.stream.unread[-len(newline) :] == newline


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
@pytest.mark.parametrize("command", ["generate BUNDLE --follow --max-new-tokens 2"])
def test_closed_streams_end_no_program(bundle, closed, command):
    line = f"{' '.join(LMINF)} {command.replace('BUNDLE', str(bundle))} {closed}"
    told = subprocess.run(
        ["bash", "-c", line], input=b"One\n", capture_output=True, check=False, timeout=60
    )
    assert told.returncode == 0, told.stderr
    assert b"internal" not in told.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, None])
def test_a_stream_is_saved_however_it_ends(bundle, tmp_path, sent):
    """None: its reader goes away."""
    state = tmp_path / "state"
    command = [*LMINF, "generate", str(bundle), "--follow", "--save-state", str(state)]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "3"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=default_signals,
    )  # fmt: skip
    process.stdin.write(b"One\n")
    process.stdin.flush()
    process.stdout.readline()
    if sent is None:
        process.stdout.close()
        process.stdin.write(b"Two\n")
        process.stdin.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""
    else:
        process.send_signal(sent)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert b"the stream is in" in told
    assert state.is_file()
