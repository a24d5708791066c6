"""The TensorRT plugin from getCreators to enqueue, on the emulated kernels, without TensorRT.

A harness in C++ (plugins/tests/harness) plays TensorRT's part; its numbers are compared with
the float64 mathematics here.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from scripts.gpu.plugin_harness import Feed, Harness, streams
from tests.support.kernel_build import shared_folder
from tests.support.plugin_build import (
    emulated_plugin,
    every_release,
    needs_compiler,
    needs_headers,
)

pytestmark = [needs_headers, needs_compiler]

STREAMS = {stream.name: stream for stream in streams()}
_FULL = STREAMS["half_rotation-in place"]
SHORT = replace(_FULL, case=_FULL.case.with_(rotary_dim=20), chunks=((1, 1, 1), (7, 3, 0)))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return emulated_plugin(shared_folder(tmp_path_factory))


@pytest.fixture
def harness(built):
    return Harness(built.harness, built.plugin)


@pytest.mark.parametrize("name", STREAMS)
def test_every_step_of_a_plugins_life_gives_the_mathematics(harness, tmp_path, name):
    reply = harness.run(STREAMS[name], tmp_path)
    assert reply.problems == []
    assert reply.outcome.error > 0


def test_the_harness_finds_a_wrong_number(harness, tmp_path):
    feed = Feed(SHORT)
    feed.write(tmp_path)
    query = tmp_path / "1.query.bin"
    query.write_bytes(bytes(reversed(query.read_bytes())))
    assert harness.play(tmp_path)["ok"]
    reply = harness.run(SHORT, tmp_path)
    assert reply.problems == []
    feed.expected[1][1].mul_(1.01)
    feed.compare(tmp_path, reply.outcome)
    assert any("present_key differs" in problem for problem in reply.problems)


def test_profiles_get_workspace_and_caches_are_aliased(harness, tmp_path):
    Feed(STREAMS["split_keys-in place"]).write(tmp_path)
    reply = harness.play(tmp_path)
    assert reply["aliases"] == [-1, 3, 4, 5, 6]
    single, chunk = reply["workspace_bytes"]
    assert 0 < single <= chunk


def test_without_sink_tokens_only_the_rings_are_aliased(harness, tmp_path):
    stream = replace(STREAMS["no_sinks-in place"], chunks=((1, 1, 1),))
    Feed(stream).write(tmp_path)
    assert harness.play(tmp_path)["aliases"] == [-1, 3, 4, -1, -1]


def test_rings_of_int8_and_their_scales_are_aliased(harness, tmp_path):
    for name, sinks in (("int8_half_rotation-in place", [5, 6]), ("int8_no_sinks-apart", [-1, -1])):
        stream = replace(STREAMS[name], chunks=((1, 1, 1),))
        Feed(stream).write(tmp_path)
        assert harness.play(tmp_path)["aliases"] == [-1, 3, 4, *sinks, 17, 18]


def test_a_node_without_scales_is_no_node_of_rings_of_int8(harness, tmp_path):
    stream = replace(STREAMS["int8_half_rotation-in place"], chunks=((1, 1, 1),))
    Feed(stream).write(tmp_path)
    path = tmp_path / "case.txt"
    text = path.read_text(encoding="utf-8").replace(
        "past_key_scale 3 2 21 1", "past_key_scale 3 2 20 1"
    )
    path.write_text(text, encoding="utf-8")
    reply = harness.play(tmp_path)
    assert (reply["ok"], reply["stage"]) == (False, "shapes")
    assert any("past_key_scale has shape" in message for message in reply["messages"])


# What is changed in case.txt → the stage that refuses it, and what the plugin's log says.
REFUSED = {
    "window of zero": (
        "int window_size 13",
        "int window_size 0",
        "createPlugin",
        "window_size = 0",
    ),
    "limit inside the window": (
        "int distance_limit 13",
        "int distance_limit 12",
        "createPlugin",
        "distance_limit = 12: must be in window_size = 13",
    ),
    "odd rotation": ("int rotary_dim 20", "int rotary_dim 19", "createPlugin", "must be even"),
    "third kind of pairs": (
        "int rotary_interleaved 0",
        "int rotary_interleaved 2",
        "createPlugin",
        "rotary_interleaved = 2: must be 0 or 1",
    ),
    "negative softcap": ("float softcap 0.0", "float softcap -1.0", "createPlugin", "softcap = -1"),
    "scale that is no number": ("float scale 0.125", "float scale nan", "createPlugin", "scale"),
    "integer for a float": (
        "float softcap 0.0",
        "int softcap 0",
        "createPlugin",
        "must be a float",
    ),
    "unknown attribute": (
        "float softcap 0.0",
        "float softcup 0.0",
        "createPlugin",
        "softcup: no such attribute",
    ),
    "ring too small for the chunk": (
        "profile 1 3 3 1 7 7",
        "profile 1 3 3 1 7 19",
        "configure",
        "ring slots C = 21: must be at least window_size + S - 1 = 13 + 19 - 1",
    ),
    "more rotated than there is": (
        "int rotary_dim 20",
        "int rotary_dim 22",
        "shapes",
        "cos has shape (-1, -1, 10), expected (-1, -1, 11)",
    ),
    "fewer sinks than the attribute says": (
        "int num_sink_tokens 5",
        "int num_sink_tokens 6",
        "shapes",
        "past_sink_key has shape (-1, 2, 5, 64), expected (-1, 2, 6, 64)",
    ),
    "head_dim without kernels": (
        " 64\n",
        " 72\n",
        "shapes",
        "head_dim = 72: the kernels take 32, 64, 80, 96, 128 and 256",
    ),
    "heads that do not divide": (
        "tensor query 3 6 ",
        "tensor query 3 5 ",
        "shapes",
        "alibi_slopes has shape (6), expected (5)",
    ),
    "rank": ("tensor past_length 3\n", "tensor past_length 3 1\n", "shapes", "expected 1 dim"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_a_message_in_the_log(harness, tmp_path, name):
    before, after, stage, words = REFUSED[name]
    Feed(SHORT).write(tmp_path)
    path = tmp_path / "case.txt"
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    reply = harness.play(tmp_path)
    assert (reply["ok"], reply["stage"]) == (False, stage)
    assert any(words in message for message in reply["messages"]), reply["messages"]
    assert all(message.startswith("LambdaAttention: ") for message in reply["messages"])


def test_a_misaligned_pointer_is_refused_before_anything_runs(harness, tmp_path):
    Feed(SHORT).write(tmp_path)
    reply = harness.play(tmp_path, misaligned=True)
    assert (reply["ok"], reply["stage"]) == (False, "enqueue")
    assert any("query at 0x" in m and "must be aligned to 16" in m for m in reply["messages"])
    assert not (tmp_path / "0.output.bin").exists()


def test_a_file_that_is_no_plugin_is_an_answer_and_no_crash(harness, tmp_path):
    Feed(SHORT).write(tmp_path)
    reply = replace(harness, plugin=tmp_path / "case.txt").play(tmp_path)
    assert (reply["ok"], reply["stage"]) == (False, "load")


EXPORTS = {"getCreators", "setLoggerFinder"}
EXPORTS |= {"lminfCachesInPlace", "lminfCachesApart", "lminfRecordCaches", "lminfCudaRuntime"}


@every_release("release")
def test_the_library_exports_its_few_functions_and_nothing_else(tmp_path_factory, release):
    table = subprocess.run(
        ["nm", "-D", "--defined-only", str(built_with(tmp_path_factory, release).plugin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[-1] for line in table.splitlines()} == EXPORTS


def built_with(tmp_path_factory, release):
    return emulated_plugin(shared_folder(tmp_path_factory), release)


# A stream of either kind of ring, in a few steps.
FEW = {
    name: replace(STREAMS[name], chunks=((1, 1, 1), (7, 3, 0), (1, 0, 1)))
    for name in ("everything-in place", "int8_interleaved-apart")
}


@pytest.mark.parametrize("name", FEW)
@every_release("headers")
@every_release("release")
def test_one_library_serves_every_release(tmp_path_factory, tmp_path, release, headers, name):
    """Whichever headers it was built with: the harness has the virtual tables of its release."""
    plugin = built_with(tmp_path_factory, headers).plugin
    harness = Harness(built_with(tmp_path_factory, release).harness, plugin)
    assert harness.run(FEW[name], tmp_path).problems == []
    (tmp_path / "case.txt").write_text(
        (tmp_path / "case.txt").read_text(encoding="utf-8").replace("int rotary_dim ", "int no "),
        encoding="utf-8",
    )
    # What it says goes through that release's logger.
    (message,) = harness.play(tmp_path)["messages"]
    assert "no: no such attribute" in message


# Caches of a step: two rings and two tensors of sinks, and with rings of int8 two of scales.
@pytest.mark.parametrize(
    ("name", "caches"), [("half_rotation", 4), ("no_sinks", 2), ("int8_half_rotation", 6)]
)
def test_the_library_counts_caches_that_are_copied_and_says_so_once(
    harness, tmp_path, name, caches
):
    stream = replace(STREAMS[f"{name}-in place"], chunks=((1, 1, 1), (7, 3, 0), (1, 0, 1)))
    Feed(stream).write(tmp_path)
    reply = harness.play(tmp_path)
    assert (reply["caches_in_place"], reply["caches_apart"]) == (3 * caches, 0)
    assert reply["warnings"] == []
    reply = harness.play(tmp_path, apart=True)
    assert (reply["caches_in_place"], reply["caches_apart"]) == (0, 3 * caches)
    (warning,) = reply["warnings"]
    assert f"past and present of {caches} caches of a layer have two addresses" in warning
