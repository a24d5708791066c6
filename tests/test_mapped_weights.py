"""Weights through one mapping of their file, and read from the disk before they are used."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

import numpy as np
import pytest

from lminf_export import Bundle, export
from lminf_export.runtime import read_ahead as reading
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from lminf_export.runtime.read_ahead import read_ahead
from tests.support.kernel_sets import needs_kernels
from tests.support.tiny_models import save_llama

IS_LINUX = platform.system() == "Linux"
# The system says which file is mapped at an address from 6.11 on.
CAN_ASK = IS_LINUX and tuple(map(int, platform.release().split(".")[:2])) >= (6, 11)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped")
    source = save_llama(folder / "m", hidden_size=192, intermediate_size=512)
    settings = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 7, "check": False}
    return {
        name: export(source, folder / name, **settings, **more)
        for name, more in (("fp32", {}), ("int8", {"quantize": "int8"}))
    }


def mappings(path: Path) -> list[int]:
    """Sizes of this process's shared mappings of a file."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)) and line.split()[1] == "r--s":
            start, stop = (int(x, 16) for x in line.split()[0].split("-"))
            found.append(stop - start)
    return found


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(not CAN_ASK, reason="this system does not say which file is mapped where")
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_weights_are_read_from_one_mapping_as_long_as_sessions_last(bundles, kind):
    bundle = Bundle.open(bundles[kind].path)
    (name,) = bundle.manifest.files_of("weights")
    file = (bundle.path / name).resolve()
    size = -(-file.stat().st_size // 4096) * 4096
    tokens = np.array([[3, 1, 4, 1, 5]])
    logits = []
    for _ in range(2):
        models = [
            LanguageModel(bundle, OnnxRuntimeSession(bundle, threads=1, kernels=kernels))
            for kernels in ("auto", "auto", "none")
        ]
        logits += [m.forward(tokens, m.new_state(), logits="last") for m in models]
        assert mappings(file) == [size], "sessions share it"
        del models
        gc.collect()
        assert mappings(file) == [], "it goes with the last session"
    for found in logits:
        np.testing.assert_allclose(found, logits[2], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not IS_LINUX, reason="the page cache of Linux")
def test_a_file_that_is_not_in_memory_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_LEAST", 1)
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(3 * 2**20 + 17))
    read_ahead([path])  # it is in memory
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read_ahead([path])
    read_ahead([])


def test_an_empty_or_small_file_is_left_alone(tmp_path):
    (tmp_path / "empty").touch()
    read_ahead([tmp_path / "empty"])
