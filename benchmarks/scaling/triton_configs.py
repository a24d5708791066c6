"""Configurations of all backends, loaded by a real tritonserver; see `triton_run`.

The wheel's server has the python backend only. So the configurations of the other two are loaded
with that in the backend's place, and a model that does nothing: the server checks inputs, outputs,
states and control tensors as it does for any backend. Nothing is run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.scaling.triton_server import TritonServer
from benchmarks.serving.servers import ServerError
from lminf_export.bundle.manifest import Manifest
from lminf_export.triton.configs import implicit_config, tensorrt_config

_MODEL = """class TritonPythonModel:
    def execute(self, requests):
        return []
"""


def configs(manifest: Manifest, environment: Path) -> dict[str, bool]:
    """Load configurations of both backends without a server of their own.

    Args:
        manifest: of the bundle that they are for.
        environment: that has the server.

    Returns:
        Whether each is loaded.
    """
    texts = {
        "onnxruntime": implicit_config("onnxruntime", manifest, 4, None),
        "tensorrt": tensorrt_config("tensorrt", manifest, 4, "/models/plugin.so"),
    }
    return {backend: _is_loaded(backend, text, environment) for backend, text in texts.items()}


def _is_loaded(backend: str, text: str, environment: Path) -> bool:
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    if parsed.backend != backend or not parsed.input:
        return False
    parsed.backend = "python"
    for group in parsed.instance_group:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
    with tempfile.TemporaryDirectory() as folder:
        version = Path(folder) / backend / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(_MODEL, encoding="utf-8")
        (version.parent / "config.pbtxt").write_text(str(parsed), encoding="utf-8")
        try:
            with TritonServer(environment, Path(folder), (backend,)):
                return True
        except ServerError as error:
            print(f"{backend}: {error}", flush=True)
            return False
