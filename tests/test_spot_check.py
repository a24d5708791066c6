"""Every export runs what it wrote against the unmodified model, and refuses a wrong graph."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks.support.foreign_checkpoints import save_checkpoint
from lminf_export import export
from lminf_export.errors import ExportError
from lminf_export.export import run as export_run
from lminf_export.tensors.files import read_header
from tests.support.tiny_models import save_llama

SETTINGS = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture
def wrong_tensor(monkeypatch):
    """Exchange the rows of one written weight, as a tensor of another name would have."""
    write = export_run.write_graph

    def wrong(*arguments, **settings):
        written = write(*arguments, **settings)
        folder = arguments[3].parent
        (name,) = written.files
        stored = next(t for n, t in read_header(folder / name).items() if n.startswith("lm_head"))
        content = np.memmap(folder / name, np.uint8, "r+", stored.offset, (stored.length,))
        content[:] = np.roll(content, stored.length // stored.shape[0])
        content.flush()
        return written

    monkeypatch.setattr(export_run, "write_graph", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "int8"},
        {"quantize": "int8"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_wrong_tensor_is_refused_and_nothing_written(options, model, wrong_tensor, tmp_path):
    with pytest.raises(ExportError, match="the written graph is not the model") as caught:
        export(model, tmp_path / "b", **SETTINGS, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rotation_of_long_texts_is_compared_by_that_of_short_ones(dtype, tmp_path):
    """The tokens of the check are a short text, for which the model has another rotation."""
    model = save_checkpoint("phi3_long", tmp_path / "m")
    bundle = export(model, tmp_path / "b", **SETTINGS, rope_regime="long", dtype=dtype)
    assert any("its long regime" in notice for notice in bundle.manifest.notices)


@pytest.mark.slow
def test_the_check_can_be_left_out(model, wrong_tensor, tmp_path):
    bundle = export(model, tmp_path / "b", **SETTINGS, check=False)
    weights = load_file(bundle.path / "model.safetensors")
    assert "lm_head.weight" in weights
