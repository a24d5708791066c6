"""ONNX models that other tools build of tiny checkpoints, once for a whole run of the tests."""

from __future__ import annotations

import lzma
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import lminf_export
from benchmarks.support.foreign_checkpoints import HEAD_DIM, save_checkpoint
from lminf_export.export.wider_graph import widen
from tests.support.made_once import MadeOnce

DATA = Path(__file__).resolve().parents[1] / "data" / "foreign"
WINDOW, SINKS, CHUNK = 23, 3, 7
LAMBDA: dict[str, Any] = {"window_size": WINDOW, "num_sink_tokens": SINKS, "chunk_size": CHUNK}
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Foreign(MadeOnce):
    """Folders of foreign models, checkpoints and exports of them."""

    def checkpoint(self, name: str) -> Path:
        """Return one of the checkpoints of `benchmarks/support/foreign_checkpoints.py`."""
        return self.made(f"checkpoints/{name}", lambda to: save_checkpoint(name, to))

    def optimum(self, name: str) -> Path:
        """Return a model of tests/data/foreign, its configuration and tokenizer beside it."""

        def unpack(to: Path) -> None:
            shutil.copytree(DATA / name / "checkpoint", to)
            (to / "model.safetensors").unlink()
            packed = (DATA / name / "model.onnx.xz").read_bytes()
            (to / "model.onnx").write_bytes(lzma.decompress(packed))

        return self.made(f"optimum/{name}", unpack)

    def exported(self, checkpoint: Path, **options: Any) -> Path:
        """Return our own export of a checkpoint."""
        place = checkpoint if checkpoint.parent.name == "checkpoints" else checkpoint.parent
        kind = "-".join((place.parent.name, place.name, *map(str, options.values())))
        name = f"exported/{kind}"
        return self.made(
            name, lambda to: lminf_export.export(checkpoint, to, check=False, **LAMBDA, **options)
        )


def tokens(count: int, vocabulary: int, rows: int = 1) -> np.ndarray:
    """Return random ids (rows, count)."""
    return np.random.default_rng(count).integers(0, vocabulary, (rows, count))


def original_logits(
    path: Path, ids: np.ndarray, *, wide: bool = False, exact: bool = False
) -> np.ndarray:
    """Run a foreign graph on a whole text, by nothing but onnxruntime; return (1, T, V).

    Args:
        path: of the graph.
        ids: (1, T).
        wide: compute in float32 what the graph computes in float16.
        exact: do not round activations to integers in products with quantised weights.
    """
    session, window = _session(path, wide, exact)
    slots = max(window, ids.shape[1]) if window else 0
    return session.run(["logits"], _feeds(session, ids, slots))[0].astype(np.float32)


@cache
def _session(path: Path, wide: bool, exact: bool) -> tuple[ort.InferenceSession, int]:
    """Return a session, and the window of its caches if they hold no more than that, else 0."""
    model = onnx.load(str(path), load_external_data=False)
    if wide:
        widen(model, (onnx.TensorProto.FLOAT16,))
    if exact:
        set_exact(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    folder = str(path.parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, _window_of_caches(model)


def _window_of_caches(model: onnx.ModelProto) -> int:
    attributes = [{a.name: a.i for a in node.attribute} for node in model.graph.node]
    return max(
        (a["local_window_size"] for a in attributes if a.get("sliding_window_cache")), default=0
    )


def set_exact(model: onnx.ModelProto) -> int:
    """Let products with quantised weights round no activations; return how many there are."""
    levels = [
        attribute
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    for level in levels:
        level.i = 1
    return len(levels)


def with_exact_products(folder: Path, to: Path) -> Path:
    """Copy a foreign model; its products with quantised weights round no activations there."""
    shutil.copytree(folder, to)
    model = onnx.load(str(to / "model.onnx"), load_external_data=False)
    assert set_exact(model)
    onnx.save(model, str(to / "model.onnx"))
    return to


def _feeds(session: ort.InferenceSession, ids: np.ndarray, slots: int) -> dict[str, np.ndarray]:
    """Return all inputs of a text without a past, in caches of some empty slots."""
    rows, count = ids.shape
    values = {
        "input_ids": ids,
        "attention_mask": np.ones((rows, count)),
        "position_ids": np.arange(count)[None].repeat(rows, 0),
        "past_sequence_length": np.array(count - 1),
        "past_seq_len": np.full((rows, 1), count - 1),
        "total_sequence_length": np.array(count),
        "total_seq_len": np.array([count]),
        "logits_to_keep": np.array([count]),
        "num_logits_to_keep": np.array([count]),
    }
    feeds = {}
    for node in session.get_inputs():
        if node.name in values:
            feeds[node.name] = values[node.name].astype(_INTEGERS[node.type])
        else:
            _, heads, _, dims = node.shape
            shape = (rows, heads, slots, dims if isinstance(dims, int) else HEAD_DIM)
            feeds[node.name] = np.zeros(shape, _FLOATS[node.type])
    return feeds
