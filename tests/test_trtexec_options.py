"""Every option of `build_engine.sh` is one that trtexec has, in every release the plan is for.

The lists of names come from trtexec's sources (scripts/checks/trtexec_options.py).
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest

from lminf_export.engine.options import EngineOptions
from lminf_export.engine.recipe import make_recipe, trtexec_script
from scripts.checks.trtexec_options import LIST, names
from tests.support.engine_graphs import request_of
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(dtype="float16", head_dim=64)
RELEASES = {
    tuple(map(int, tag.removeprefix("v").split(".")[:2])): record
    for tag, record in json.loads(LIST.read_text(encoding="utf-8"))["releases"].items()
}
EVERYTHING = {
    "workspace": "1G",
    "builder_optimization_level": 4,
    "timing_cache": "a/cache",
}
REQUESTS = {
    "plugin": (True, EngineOptions(**EVERYTHING)),
    "plugin inside the plan": (True, EngineOptions(**EVERYTHING, embed_plugin=True)),
    "caches only bound": (True, EngineOptions(**EVERYTHING, cache_aliasing="bound")),
    "standard operators": (False, EngineOptions(**EVERYTHING, plugin="none")),
}


def words_of(script):
    """The words of the command that a script ends with."""
    lines = script.replace(" \\\n", " ").splitlines()
    (command,) = (line for line in lines if line.startswith('"$trtexec" '))
    return shlex.split(command)[1:]


@pytest.mark.parametrize("name", REQUESTS)
def test_every_option_of_the_script_is_one_of_each_release(tmp_path, name):
    with_plugin, options = REQUESTS[name]
    request = request_of(TINY, tmp_path, onnx_path=tmp_path / "engine.onnx")
    recipe = make_recipe(replace(request, with_plugin=with_plugin, options=options))
    script = trtexec_script(recipe)
    # The script names the oldest release that it is for.
    oldest = tuple(map(int, re.search(r"TensorRT (\d+)\.(\d+) or", script).groups()))
    meant = {release: record for release, record in RELEASES.items() if release >= oldest}
    assert min(meant) == oldest
    assert {release[0] for release in meant} == {10, 11}
    words = words_of(script)
    assert len(words) > 10
    for release, known in meant.items():
        for word in words:
            option, _, value = word.partition("=")
            assert option.removeprefix("--") in known["options"].split(), (release, word)
            if option == "--preview":
                assert value.removeprefix("+") in known["preview"].split(), release
            if option == "--memPoolSize":
                assert value.split(":")[0] in known["pools"].split(), release


def test_the_lists_lack_what_a_release_lacks():
    """A list that held everything would prove nothing."""
    assert "fp16" in RELEASES[10, 3]["options"].split()
    assert "fp16" not in RELEASES[11, 1]["options"].split()
    assert "monitorMemory" not in RELEASES[10, 3]["options"].split()


def test_only_whole_strings_are_options():
    source = (
        'getAndDelOption(arguments, "--avgTiming", x); << "  --noTF32  Disable" << "--a=b"\n'
        'if (featureName == "aliasedPluginIO1003") {} if (memPoolName == "workspace")'
    )
    assert names(source) == {
        "options": ["avgTiming"],
        "preview": ["aliasedPluginIO1003"],
        "pools": ["workspace"],
    }
