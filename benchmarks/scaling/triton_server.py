"""NVIDIA's Triton Inference Server, bare, out of PyPI's wheels: an environment, and its process.

The wheel `nvidia-pytriton` carries the server with its python backend only. That backend runs the
Python whose `bin` is first in PATH. Its release reads arrays by the layout that numpy had before
version 2, so the environment has numpy 1.26. The client's package is there, too, since it bounds
protobuf.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from typing import IO

import httpx

from benchmarks.serving.servers import END_SECONDS, ServerError, end, free_port

SERVER = "nvidia-pytriton==0.7.0"
NUMPY = "numpy<2"
CLIENT = "tritonclient[grpc]==2.73.0"
# What the server of a bundle imports, and onnx for its repository; torch and transformers are for
# exports only.
NEEDED = (
    "click", "fastapi", "fsspec", "httpx", "huggingface-hub", "jinja2", "ml-dtypes", "onnx",
    "onnxruntime", "prometheus-client", "psutil", "pydantic", "rich", "safetensors",
    "tokenizers", "uvicorn",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0


def make_environment(folder: Path) -> Path:
    """Make an environment with the server and what its backend imports, unless it is there.

    Args:
        folder: of the environment.

    Returns:
        The same.
    """
    done = folder / "complete"
    if done.exists():
        return folder
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", SERVER], check=True, stdout=sys.stderr)
    subprocess.run([*pip, NUMPY, *NEEDED, CLIENT], check=True, stdout=sys.stderr)
    packages = _packages(folder)
    # This tree, as an editable installation would have it.
    (packages / "lminf.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    server = packages / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / version / stub, server / "backends/python" / stub)
    done.touch()
    return folder


class TritonServer:
    """A server's process, at 127.0.0.1.

    Args:
        environment: from `make_environment`.
        repository: of models.
        models: those to load.
        threads: of operators.

    Raises:
        ServerError: it ended, or was not ready in time.
    """

    def __init__(
        self, environment: Path, repository: Path, models: tuple[str, ...], threads: int = 1
    ) -> None:
        packages = _packages(environment)
        server = packages / "pytriton" / "tritonserver"
        self.ports = {kind: free_port() for kind in ("http", "grpc", "metrics")}
        command = [
            str(server / "bin" / "tritonserver"), f"--model-repository={repository}",
            f"--backend-directory={server / 'backends'}", "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in models), "--exit-timeout-secs=10",
        ]  # fmt: skip
        for kind, port in self.ports.items():
            command += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
        libraries = [sysconfig.get_config_var("LIBDIR"), str(packages / "nvidia_pytriton.libs")]
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in stop
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
                # This tree, whatever the environment was made for.
                "PYTHONPATH": str(ROOT),
                "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
                "OMP_NUM_THREADS": str(threads),
            },
        )
        self._wait_ready()

    @property
    def grpc(self) -> str:
        """Address for clients of gRPC."""
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def http(self) -> str:
        """Address for clients of HTTP."""
        return f"127.0.0.1:{self.ports['http']}"

    def metric(self, name: str) -> float | None:
        """Return a metric of the only model; None if there is none yet."""
        text = httpx.get(f"http://127.0.0.1:{self.ports['metrics']}/metrics").text
        found = [line for line in text.splitlines() if line.startswith(name + "{")]
        return float(found[0].split()[-1]) if found else None

    def log(self) -> str:
        """The end of what it wrote."""
        self._log.seek(0)
        return self._log.read()[-3000:]

    def sleep(self) -> None:
        """Stop the server's processes until `wake`."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server."""
        self.wake()
        end(self.process, 2 * END_SECONDS)
        self._log.close()

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal(self, number: int) -> None:
        import psutil

        try:
            process = psutil.Process(self.process.pid)
            for each in (process, *process.children(recursive=True)):
                each.send_signal(number)
        except psutil.NoSuchProcess:
            pass

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        url = f"http://{self.http}/v2/health/ready"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"tritonserver ended: {self.log()}")
            try:
                if httpx.get(url).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        said = self.log()
        self.stop()
        raise ServerError(f"tritonserver was not ready in {START_SECONDS:.0f} s: {said}")


def _packages(environment: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"
