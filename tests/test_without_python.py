"""The samples that run a bundle without this package: the same logits, and no warnings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from lminf_export.export.run import export
from lminf_export.runtime.kernels import INSTALLED
from lminf_export.runtime.load import load
from tests.support.tiny_models import save_llama

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "examples" / "without_python"
PAGE = ROOT / "docs" / "without_python.md"
NEW_TOKENS = 230  # with the prompt more than twice around the largest ring
PROMPT = [(7 * i + 3) % 97 for i in range(50)]
# A Python in which nothing but numpy, onnxruntime and the standard library can be imported.
ALONE = (
    "import runpy, sys\n"
    "for name in ('lminf_export', 'onnx', 'torch', 'transformers'): sys.modules[name] = None\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)
CASES = {
    "llama": ("demo-llama", {}),
    "mpt": ("demo-mpt", {"num_sink_tokens": 0}),
    "int8 cache": ("demo-llama", {"kv_cache_dtype": "int8"}),
    "float16": ("demo-llama", {"dtype": "float16"}),
}


@pytest.fixture(scope="module", params=CASES)
def bundle(request, tmp_path_factory):
    name, options = CASES[request.param]
    out = tmp_path_factory.mktemp("bundles") / "b"
    return export(ROOT / "examples" / name, out, window_size=64, chunk_size=32, **options)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ sample, built as its page says with what Python's wheel has."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    folder = tmp_path_factory.mktemp("program")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(folder / "generate")}
    environment.pop("ONNXRUNTIME_ROOT", None)
    subprocess.run(["sh", SAMPLES / "build.sh"], check=True, env=environment, timeout=300)
    return folder / "generate"


def generated(command, bundle, kernels=None):
    """(token, logit) rows of a sample, which must say nothing else."""
    variables = {k: v for k, v in os.environ.items() if k not in ("LMINF_KERNELS", "PYTHONPATH")}
    if kernels is not None:
        variables["LMINF_KERNELS"] = str(kernels)
    done = subprocess.run(
        [*map(str, command), str(bundle.graph_path), str(NEW_TOKENS), *map(str, PROMPT)],
        capture_output=True,
        text=True,
        env=variables,
        cwd=bundle.path.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [(int(t), np.float32(x)) for t, x in map(str.split, done.stdout.splitlines())]


def expected(bundle, kernels):
    """The same by this package."""
    model = load(bundle.path, kernels=kernels)
    state, rows = model.new_state(), []
    logits = model.forward([PROMPT], state, logits="last")
    for _ in range(NEW_TOKENS):
        token = int(logits[0, -1].argmax())
        rows.append((token, logits[0, -1, token]))
        logits = model.forward([[token]], state, logits="last")
    return rows


def assert_same(found, wanted):
    assert [token for token, _ in found] == [token for token, _ in wanted]
    assert np.array_equal([x for _, x in found], np.array([x for _, x in wanted], np.float32))


@pytest.mark.slow
def test_python_with_onnxruntime_alone_gives_the_same_logits(bundle):
    command = [sys.executable, "-c", ALONE, SAMPLES / "generate.py"]
    assert_same(generated(command, bundle), expected(bundle, "none"))


@pytest.mark.slow
def test_cpp_gives_the_same_logits(bundle, program):
    assert_same(generated([program], bundle), expected(bundle, "none"))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED.is_file(), reason="this installation has no kernels")
def test_both_take_the_kernels(bundle, program):
    wanted = expected(bundle, INSTALLED)
    python = [sys.executable, "-c", ALONE, SAMPLES / "generate.py"]
    for command in (python, [program]):
        assert_same(generated(command, bundle, INSTALLED), wanted)


PLAIN_RUN = """
import sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
sizes = {"batch": 1, "sequence": 1, "num_logits": 1}
types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
feed = {
    value.name: np.zeros(
        [n if isinstance(n, int) else sizes.get(n) or int(n.removeprefix("ring_"))
         for n in value.shape], types[value.type])
    for value in session.get_inputs()
}
feed["new_length"][:] = 1
options = ort.RunOptions()
options.log_severity_level = int(sys.argv[2])
for _ in range(3):
    session.run(None, feed, options)
"""


@pytest.mark.slow
def test_a_plain_run_warns_twice_a_layer_and_token_and_can_be_silenced(tmp_path):
    model = save_llama(tmp_path / "m", num_hidden_layers=2)
    bundle = export(model, tmp_path / "b", window_size=11, chunk_size=7)
    said = {}
    for severity in (2, 3):
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_RUN, str(bundle.graph_path), str(severity)],
            check=True,
            capture_output=True,
            text=True,
        )
        said[severity] = done.stderr.count("in-place optimization not activated")
    assert said == {2: 3 * 2 * 2, 3: 0}


def test_wrong_arguments_are_one_line(program, tmp_path):
    for words, code in (([], 2), ([str(tmp_path / "none.onnx"), "1", "2"], 1)):
        done = subprocess.run([program, *words], capture_output=True, text=True)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == 1


def test_the_page_quotes_the_samples_as_they_are():
    text = PAGE.read_text(encoding="utf-8")
    for language, name in (("python", "generate.py"), ("cpp", "generate.cc")):
        blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
        assert blocks
        source = (SAMPLES / name).read_text(encoding="utf-8")
        assert all(block in source for block in blocks), language


HEADER = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")


@pytest.mark.skipif(HEADER is None, reason="no official header (ONNXRUNTIME_INCLUDE_DIR)")
def test_our_declarations_are_those_of_the_official_header(tmp_path):
    ours = (SAMPLES / "include" / "onnxruntime_c_api.h").read_text(encoding="utf-8")
    names = re.findall(r"ENTRY\((?:\w+|const char\*), (\w+),|STATUS_ENTRY\((\w+),", ours)
    entries = sorted({a or b for a, b in names} - {"NAME", "GetApi", "GetVersionString"})
    assert len(entries) > 25
    values = re.findall(r"\b(ORT_LOGGING\w+|Ort\w+Default|OrtArenaAllocator|ONNX_T\w+_\w+) =", ours)
    prints = [f'std::printf("{name} %zu\\n", offsetof(OrtApi, {name}));' for name in entries]
    prints += [f'std::printf("{name} %d\\n", int({name}));' for name in values]
    source = tmp_path / "places.cc"
    source.write_text(
        "#include <onnxruntime_c_api.h>\n#include <cstddef>\n#include <cstdio>\n"
        f"int main() {{ {''.join(prints)} }}\n"
    )
    said = []
    for include in (SAMPLES / "include", HEADER):
        for words in (["-fsyntax-only", SAMPLES / "generate.cc"], [source, "-o", tmp_path / "p"]):
            subprocess.run(["c++", "-std=c++17", "-isystem", include, *words], check=True)
        said.append(subprocess.run([tmp_path / "p"], capture_output=True, text=True).stdout)
    assert said[0] == said[1]


@pytest.mark.slow
def test_the_metadata_the_page_names_is_in_the_graph(tmp_path):
    model = save_llama(tmp_path / "m", num_hidden_layers=2)
    bundle = export(model, tmp_path / "b", window_size=11, chunk_size=7, kv_cache_dtype="int8")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle.graph_path, options, providers=["CPUExecutionProvider"])
    keys = set(re.findall(r"`(lminf\.[a-z_]+)`", PAGE.read_text(encoding="utf-8")))
    keys -= {"lminf.json"}
    assert len(keys) == 7
    assert keys <= session.get_modelmeta().custom_metadata_map.keys()
