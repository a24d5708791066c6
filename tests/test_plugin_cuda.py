"""The plugin's CUDA runtime against the driver, and the GPUs its kernels are compiled for."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest

from lminf_export.engine import plugin
from lminf_export.engine.options import EngineOptions
from lminf_export.errors import EngineError, SessionError
from lminf_export.runtime.plugin_cuda import cuda_runtime, driver_problem
from tests.support.kernel_build import PLUGINS
from tests.support.plugin_build import built_mark, needs_compiler
from tests.support.tensorrt_doubles import ADA, Setup

LIBRARY = b"\x7fELF getCreators LambdaAttention\0"


def says(version):
    return LIBRARY + b"lminf_tensorrt CUDA runtime %d\0" % version


@needs_compiler
@pytest.mark.parametrize(("defined", "wanted"), [("13000", 13000), ("11080", 11080), (None, None)])
def test_a_compiled_library_tells_its_runtime_without_being_loaded(tmp_path, defined, wanted):
    assert cuda_runtime(built_mark(tmp_path, defined)) == wanted


@pytest.mark.parametrize(
    ("runtime", "driver", "runs"),
    [
        (13000, 12090, False),
        (13000, 13000, True),
        (13010, 13000, True),  # minor releases run on each other's drivers
        (12080, 12000, True),
        (12080, 11080, False),
        (12080, 13000, True),
        (14000, 13010, False),
        (13000, 0, True),  # a driver that does not say is left to try
    ],
)
def test_a_driver_runs_its_own_major_release_and_older_ones(tmp_path, runtime, driver, runs):
    path = tmp_path / "lib.so"
    path.write_bytes(says(runtime))
    problem = driver_problem(path, replace(ADA, driver_cuda=driver))
    assert (problem is None) == runs
    path.write_bytes(LIBRARY)
    assert driver_problem(path, replace(ADA, driver_cuda=driver)) is None


WORDS = (
    r"holds the runtime of CUDA 13\.0, which needs an NVIDIA driver R580 or later; this "
    r"machine's is for CUDA 12\.4: install a newer driver, or build the plugin with CUDA 12"
)
OLD = replace(ADA, driver_cuda=12040)


def test_a_session_refuses_before_anything_is_loaded(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch, gpu=OLD, plugin="beside", content=says(13000))
    with pytest.raises(SessionError, match=WORDS):
        setup.open()
    assert setup.registry is None
    Setup(tmp_path / "b", monkeypatch, gpu=OLD, plugin="beside", content=says(12080)).open()


def test_a_build_here_refuses_and_one_elsewhere_does_not(tmp_path, monkeypatch):
    path = tmp_path / "lib.so"
    path.write_bytes(says(13000))
    monkeypatch.setattr(plugin, "find_gpu", lambda: OLD)
    options = EngineOptions(plugin=path)
    with pytest.raises(EngineError, match=WORDS):
        plugin.find_plugin(options)
    assert plugin.find_plugin(options, required=False) == path
    monkeypatch.setattr(plugin, "find_gpu", lambda: replace(OLD, driver_cuda=13000))
    assert plugin.find_plugin(options) == path


ARCHITECTURES = """
include({file})
lminf_cuda_architectures({version} found)
message("${{found}}")
"""


def architectures(tmp_path, version):
    script = tmp_path / "ask.cmake"
    file = PLUGINS / "cmake" / "cuda_architectures.cmake"
    script.write_text(ARCHITECTURES.format(file=f'"{file}"', version=version), encoding="utf-8")
    return subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, check=False)


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
# The first release of nvcc that knows a GPU (release notes of the CUDA toolkit).
SINCE = {80: (11, 0), 86: (11, 1), 89: (11, 8), 90: (11, 8), 100: (12, 8), 120: (12, 8)}


@needs_cmake
@pytest.mark.parametrize(
    "version",
    ["11.8.89", "12.0.76", "12.6.85", "12.7.0", "12.8.61", "12.9.41", "13.0.48", "13.2.1"],
)
def test_every_compiler_gets_the_gpus_it_knows_and_no_other(tmp_path, version):
    found = architectures(tmp_path, version).stderr.strip().split(";")
    number = tuple(map(int, version.split(".")[:2]))
    known = [gpu for gpu, since in SINCE.items() if since <= number]
    assert [int(name.removesuffix("-real")) for name in found] == known
    # PTX of the first, for what has no machine code, and of the last, for GPUs to come.
    assert [name for name in found if not name.endswith("-real")] == [str(known[0]), str(known[-1])]


@needs_cmake
def test_a_compiler_that_is_too_old_is_named(tmp_path):
    done = architectures(tmp_path, "11.7.99")
    assert done.returncode != 0
    assert "CUDA 11.7.99" in done.stderr
    assert "11.8 or later" in done.stderr
