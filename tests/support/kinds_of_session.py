"""The three kinds of session on one tiny bundle: onnxruntime, and two engines on doubles."""

from __future__ import annotations

from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from tests.support.tensorrt_doubles import Setup

KINDS = ["onnxruntime", "engine", "engine with the plugin"]


def opened(kind, folder, monkeypatch, tiny, **settings):
    if kind == "onnxruntime":
        return load(tiny.write(folder / "bundle").path, threads=1, kernels="none")
    plugin = {"engine": None, "engine with the plugin": "beside"}[kind]
    setup = Setup(folder, monkeypatch, tiny=tiny, plugin=plugin, **settings)
    return LanguageModel(setup.bundle, setup.open())
