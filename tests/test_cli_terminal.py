"""Commands in terminals of any encoding, their help, their guesses, their last words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from lminf_export.cli import terminal
from lminf_export.cli.common import require_unicode
from lminf_export.cli.export import export_command
from lminf_export.cli.main import cli
from lminf_export.cli.signals import when_interrupted
from lminf_export.errors import InputError
from tests.support.signals import default_signals
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

LMINF = [sys.executable, "-m", "lminf_export.cli.main"]
EXPORT = [sys.executable, "-m", "lminf_export.cli.export"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return TinyModel().write(tmp_path_factory.mktemp("b") / "tiny").path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "tiny-llama")


def run(*arguments):
    return CliRunner().invoke(cli, [str(x) for x in arguments])


def program(command, *arguments, **environment):
    changed = {**os.environ, **environment}
    done = subprocess.run(
        [*command, *(os.fsencode(x) for x in arguments)], env=changed, capture_output=True
    )
    assert b"Traceback" not in done.stderr
    return done


ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.sampled
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_of_the_terminal_ends_a_command(encoding, bundle):
    settings = ENCODINGS[encoding]
    for words in (
        ["--help"],
        ["inspect", bundle],
        ["generate", bundle, "--prompt", "日本語 Λ é 😀", "--max-new-tokens", "20", "--stats"],
    ):
        assert program(LMINF, *words, **settings).returncode == 0
    done = program(LMINF, "inspect", bundle, "--json", **settings)
    assert json.loads(done.stdout)["manifest"]
    assert program(LMINF, "inspect", "/no/Λ", **settings).returncode == 2


def test_signs_that_an_encoding_lacks_have_plain_ones():
    terminal.make_streams_safe()
    text = "Λ ± 日 \udcff"
    assert text.encode("ascii", "lminf_readable") == b"Lambda +- \\u65e5 \\udcff"
    assert "é ±".encode("latin-1", "lminf_readable") == b"\xe9 \xb1"


def test_an_argument_is_read_as_utf8_in_any_locale():
    assert require_unicode("--prompt", "日本") == "日本"
    assert require_unicode("--prompt", "日本".encode().decode("ascii", "surrogateescape")) == "日本"
    with pytest.raises(InputError, match=r"--prompt is not UTF-8 \(byte 1"):
        require_unicode("--prompt", "a\udcff")


def test_a_prompt_that_is_not_utf8_is_one_line(bundle):
    done = program(LMINF, "generate", bundle, "--prompt", "a\udcff")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(b"error: --prompt is not UTF-8")


@pytest.mark.slow
def test_a_path_that_is_not_utf8_is_named_as_such(llama, tmp_path):
    odd = str(tmp_path / "odd\udcff")
    os.mkdir(odd)
    for name in os.listdir(llama):
        (tmp_path / odd / name).write_bytes((llama / name).read_bytes())
    for command, words in (
        (EXPORT, ["--model", odd, "--out", tmp_path / "b"]),
        (EXPORT, ["--model", llama, "--out", odd + "2"]),
        (LMINF, ["inspect", odd]),
    ):
        done = program(command, *words)
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        assert rb"odd\xff" in line
        assert b"is not UTF-8" in line
    assert sorted(os.listdir(tmp_path)) == ["odd\udcff"]


@pytest.mark.parametrize("group", [[], ["eval"]])
def test_a_group_alone_prints_its_help(group):
    result = run(*group)
    assert result.exit_code == 0
    assert "Commands:" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["genrate"], "did you mean generate?"),
        (["validat"], "did you mean validate?"),
        (["eval", "perplexty"], "did you mean perplexity?"),
        (["zzz"], "there are: generate, chat, validate"),
    ],
)
def test_an_unknown_command_gets_the_closest(words, wanted):
    result = run(*words)
    assert result.exit_code == 2
    assert wanted in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands(shell):
    words = {"COMP_WORDS": "lminf eval p", "COMP_CWORD": "2"}
    done = program(LMINF, _LMINF_COMPLETE=f"{shell}_complete", **words)
    assert b"perplexity" in done.stdout


def test_shells_complete_choices():
    words = {"COMP_WORDS": "lminf-export --dtype ", "COMP_CWORD": "2"}
    done = program(EXPORT, _LMINF_EXPORT_COMPLETE="bash_complete", **words)
    assert b"float16" in done.stdout
    assert b"_LMINF_EXPORT_COMPLETE" in program(EXPORT, _LMINF_EXPORT_COMPLETE="bash_source").stdout


def test_endless_and_a_number_of_tokens_exclude_each_other(bundle):
    result = run("generate", bundle, "--prompt", "a", "--endless", "--max-new-tokens", 5)
    assert result.exit_code == 2
    assert "--endless has no --max-new-tokens" in result.stderr


def test_a_text_is_printed_as_json(bundle):
    options = ("--prompt", "Hello", "--max-new-tokens", 6, "--ignore-eos")
    text = run("generate", bundle, *options).stdout
    result = json.loads(run("generate", bundle, *options, "--json").stdout)
    assert result["text"] == text.removesuffix("\n")
    assert len(result["token_ids"]) == result["new_tokens"] == 6
    assert result["finish_reason"] == "length"
    assert 0 < result["cache_bytes"] <= result["max_cache_bytes"]
    stopped = run("generate", bundle, *options, "--json", "--stop", result["text"][2:4])
    assert json.loads(stopped.stdout)["finish_reason"] == "stop_text"
    assert json.loads(stopped.stdout)["text"] == result["text"][:2]
    assert run("generate", bundle, "--prompt", "a", "--json", "--endless").exit_code == 2


def test_ctrl_c_prints_the_statistics_and_what_is_kept(bundle):
    command = [*LMINF, "generate", str(bundle), "--prompt", "a", "--endless", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, "--stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=default_signals,
    )
    assert process.stdout.read(4)  # a few tokens: one alone has no speed
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    statistics, last = messages.decode().strip().splitlines()
    assert "tokens/s" in statistics
    assert last.startswith("interrupted: the ")


def test_when_interrupted_says_what_is_kept():
    @click.command()
    def command():
        with when_interrupted(lambda: "nothing"):
            raise KeyboardInterrupt

    result = CliRunner().invoke(command)
    assert result.exit_code == 130
    assert result.stderr == "\ninterrupted: nothing\n"


class TestExport:
    def run(self, *arguments):
        return CliRunner().invoke(export_command, [str(x) for x in arguments])

    def test_a_dry_run_needs_no_force(self, llama, bundle):
        before = sorted(bundle.iterdir())
        result = self.run("--model", llama, "--out", bundle, "--dry-run", "--window-size", 20)
        assert result.exit_code == 0, result.stderr
        assert "a bundle is there already; --force replaces it" in result.stdout
        assert sorted(bundle.iterdir()) == before
        assert self.run("--model", llama, "--out", bundle).exit_code == 2

    @pytest.mark.parametrize(
        "wrong",
        [
            ["--window-size", "0"],
            ["--num-sink-tokens", "-1"],
            ["--distance-limit", "3", "--window-size", "9"],
            ["--max-batch-size", "0"],
            ["--kv-cache-dtype", "int8", "--dtype", "bfloat16"],
            ["--weights", "link", "--quantize", "int4"],
            ["--lora", "/nowhere"],
        ],
    )
    def test_a_wrong_option_comes_before_a_place_that_is_taken(self, wrong, llama, bundle):
        result = self.run("--model", llama, "--out", bundle, *wrong)
        assert result.exit_code == 2
        assert "is a bundle already" not in result.stderr

    def test_a_place_that_is_taken_comes_before_a_download(self, bundle, monkeypatch):
        monkeypatch.setattr("lminf_export.checkpoint.source._download", lambda *_: 1 / 0)
        result = self.run("--model", "some/model", "--out", bundle)
        assert "is a bundle already" in result.stderr

    @pytest.mark.parametrize(("short", "full"), [("fp16", "float16"), ("fp32", "float32")])
    def test_short_names_of_element_types(self, short, full, llama, tmp_path):
        words = ["--model", llama, "--out", tmp_path / "b", "--window-size", 20, "--dtype", short]
        result = self.run(*words, "--dry-run", "--json")
        report = json.loads(result.stdout)
        assert report["manifest"]["dtype"] == full
        assert report["dry_run"] is True
        assert not report["exists"]

    def test_what_was_written_is_printed_as_json(self, llama, tmp_path):
        out = tmp_path / "b"
        result = self.run("--model", llama, "--out", out, "--window-size", 20, "--json")
        report = json.loads(result.stdout)
        assert report["bundle"] == str(out)
        assert report["manifest"] == json.loads((out / "lminf.json").read_text())
