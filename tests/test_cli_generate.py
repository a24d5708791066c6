"""`lminf generate` and what both commands share: text on stdout, one line on stderr, exit codes."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.main import cli
from lminf_export.errors import BundleError
from lminf_export.runtime.load import load
from tests.support.signals import default_signals
from tests.support.tiny_bundle import TinyModel

LMINF = [sys.executable, "-m", "lminf_export.cli.main"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return TinyModel().write(tmp_path_factory.mktemp("b") / "tiny").path


def lminf(*arguments, **options):
    return CliRunner().invoke(cli, [str(a) for a in arguments], **options)


def refused(result):
    """The one line a refused command prints."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def expected_text(bundle, prompt, **settings):
    lm = load(bundle, threads=1)
    ids = lm.codec.encode(prompt)
    return "".join(lm.codec.stream(lm.generate(ids, **settings), after=ids))


def test_the_text_of_the_python_interface_is_printed(bundle):
    result = lminf("generate", bundle, "--prompt", "Hello", "--max-new-tokens", 30)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected_text(bundle, "Hello", max_new_tokens=30) + "\n"
    assert result.stderr == ""


def test_sampling_options_arrive(bundle):
    options = ["--temperature", 9, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.001]
    options += ["--repetition-penalty", 1.2, "--seed", 11, "--max-new-tokens", 25]
    result = lminf("generate", bundle, "--prompt", "x", *options)
    text = expected_text(
        bundle,
        "x",
        temperature=9,
        top_k=50,
        top_p=0.9,
        min_p=0.001,
        repetition_penalty=1.2,
        seed=11,
        max_new_tokens=25,
    )
    assert result.stdout == text + "\n"


def test_a_prompt_comes_from_a_file_or_from_stdin(bundle, tmp_path):
    (tmp_path / "prompt").write_text("né", encoding="utf-8")
    text = expected_text(bundle, "né", max_new_tokens=9) + "\n"
    few = ["--max-new-tokens", 9]
    assert lminf("generate", bundle, "--prompt-file", tmp_path / "prompt", *few).stdout == text
    assert lminf("generate", bundle, "-", *few, input="né").stdout == text
    assert lminf("generate", bundle, "--prompt-file", "-", *few, input="né").stdout == text


def test_a_stop_string_ends_the_text_and_is_not_printed(bundle):
    text = expected_text(bundle, "Hello", max_new_tokens=60)
    stop = text[20:23]
    result = lminf("generate", bundle, "--prompt", "Hello", "--max-new-tokens", 60, "--stop", stop)
    assert result.stdout == text[: text.index(stop)] + "\n"


def test_statistics_go_to_stderr(bundle):
    result = lminf("generate", bundle, "--prompt", "Hi", "--max-new-tokens", 40, "--stats")
    assert "prompt 2 tokens, first token after" in result.stderr
    assert "40 tokens at" in result.stderr
    assert "tokens/s, cache 4.5 KiB of at most 4.5 KiB" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the text once"),
        (["--prompt", "a", "-"], "give the text once"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-file", "nowhere"], "cannot read nowhere: No such file"),
        (["--prompt", "a", "--top-p", "0"], "top_p=0.0: must be above 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bundle, arguments, message):
    assert message in refused(lminf("generate", bundle, *arguments))


def test_a_prompt_file_that_is_not_utf8_is_refused(bundle, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused(
        lminf("generate", bundle, "--prompt-file", tmp_path / "prompt")
    )


def test_a_path_that_is_no_bundle_is_refused(tmp_path):
    result = lminf("generate", tmp_path, "--prompt", "a")
    assert "is not a bundle: it has no lminf.json" in refused(result)
    result = lminf("generate", tmp_path / "nowhere", "--prompt", "a")
    assert "does not exist" in refused(result)


def test_verify_hashes_the_weights_too(tmp_path):
    bundle = TinyModel().write(tmp_path / "b").path
    weights = bundle / "model.onnx.data"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    few = ["--prompt", "a", "--max-new-tokens", 1]
    assert lminf("generate", bundle, *few).exit_code == 0
    assert "was altered" in refused(lminf("generate", bundle, *few, "--verify"))


def test_logits_that_are_not_finite_are_one_line(tmp_path):
    tiny = TinyModel(nan_token=5)
    bundle = tiny.write(tmp_path / "nan")
    token = load(bundle.path, threads=1).codec.tokenizer.id_to_token(5)
    assert len(token) == 1
    result = lminf("generate", bundle.path, "--prompt", token)
    assert "not finite" in refused(result)


def test_errors_reach_the_shell_without_a_traceback(tmp_path):
    command = [*LMINF, "generate", str(tmp_path), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def endless(bundle):
    command = [*LMINF, "generate", str(bundle), "--prompt", "a", "--endless"]
    return subprocess.Popen(
        [*command, "--temperature", "9"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=default_signals,
    )


def test_text_streams_within_three_seconds_and_ctrl_c_ends_it_quietly(bundle):
    started = time.perf_counter()
    process = endless(bundle)
    assert process.stdout.read(1)
    # The bound for the demo model; half of it is left for a busy machine.
    assert time.perf_counter() - started < 6
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    [line] = messages.strip().splitlines()
    assert line.startswith(b"interrupted: the ")


def test_a_reader_that_goes_away_ends_it_quietly(bundle):
    process = endless(bundle)
    assert process.stdout.read(10)
    process.stdout.close()
    process.wait(timeout=30)
    assert process.returncode == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BundleError("two\nlines"), "error: two lines"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "file"), "error: file: Permission"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "error: Input/output error"),
    ],
)
def test_what_a_user_can_cause_is_one_line(error, line):
    @click.command()
    @handle_errors
    def command():
        raise error

    assert refused(CliRunner().invoke(command)).startswith(line)


def test_a_bug_is_one_line_with_a_traceback_and_a_code_of_its_own():
    @click.command()
    @verbosity_options
    @handle_errors
    def command():
        raise KeyError("bug")

    result = CliRunner().invoke(command)
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    found = re.fullmatch(r"internal error: KeyError: 'bug' \(traceback: (.+)\)", line)
    text = Path(found[1]).read_text()
    Path(found[1]).unlink()
    assert "Traceback" in text
    assert 'raise KeyError("bug")' in text
    result = CliRunner().invoke(command, ["-v"])
    Path(re.search(r"traceback: (.+)\)", result.stderr)[1]).unlink()
    assert text in result.stderr


def test_what_click_raises_is_no_bug():
    @click.command()
    @handle_errors
    def command():
        raise click.UsageError("wrong")

    result = CliRunner().invoke(command)
    assert result.exit_code == 2
    assert "internal" not in result.stderr


def test_help_names_every_command_and_imports_none():
    code = (
        "import sys; from click.testing import CliRunner; from lminf_export.cli.main import cli\n"
        "result = CliRunner().invoke(cli, ['--help'])\n"
        "assert all(name in result.output for name in ('generate', 'validate', 'inspect'))\n"
        "assert result.exit_code == 0\n"
        "assert not {'numpy', 'torch', 'onnxruntime', 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_command_and_the_version(bundle):
    assert lminf("nonsense").exit_code == 2
    assert lminf("--version").output.startswith("lminf ")
    assert "Continue a text" in lminf("generate", "--help").output
