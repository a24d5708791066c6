"""The page beside the models of a repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lminf_export.bundle.files import human_bytes, sync
from lminf_export.bundle.manifest import Manifest
from lminf_export.triton.plans import why_not_tensorrt_backend

PAGE = "README.md"
_OURS = "Written by `lminf export-triton` from"
_PYTHON = """
## {name}: our runtime in the python backend

Text or token ids in, text out, streamed; requests share one engine's batch; sequences are sessions.
The environment of the server's Python needs `pip install 'lminf-export[serve]'`.

    tritonserver --model-repository . --http-address 127.0.0.1 --grpc-address 127.0.0.1 \\
        --metrics-address 127.0.0.1
    curl -s localhost:8000/v2/models/{name}/generate -d '{{"text_input": "It is a truth",
      "sampling_parameters": "{{\\"max_tokens\\": 16, \\"temperature\\": 0}}"}}'

By gRPC a sequence id makes a session: START begins it, requests without START go on where it
stands, END forgets it behind its answer. `config.pbtxt` names all tensors and parameters.
"""
_IMPLICIT = """
## {name}_implicit: the bare graph in onnxruntime's backend

Token ids in, logits out; Triton carries {bytes} of state for each sequence from request to request,
and the client chooses tokens. Triton copies that state at every request and holds it for idle rows,
too, so take it for small models or few sequences, and where Python may not run in the server.
"""
_TENSORRT = """
## {name}_tensorrt: the plan in TensorRT's backend

NOT RUN: its configuration was written by the plan's contract; no machine with a GPU has seen it.
Caches are inputs and outputs of each request, so they cross the server's memory.
"""
_PLAN = """
## {name}_tensorrt: the plan, by our runtime in the python backend

NOT RUN: no machine with a GPU and Triton has seen it. Its tensors are those of the python backend,
and its caches stay on the GPU. The environment of the server's Python needs TensorRT and
`pip install 'lminf-export[serve]'`. Triton's own TensorRT backend is not used:
{why}.
"""


def readme(manifest: Manifest, name: str, backends: Sequence[str]) -> str:
    """Return the page.

    Args:
        manifest: of the bundle.
        name: of the model.
        backends: that the repository has.
    """
    why = why_not_tensorrt_backend(manifest) if "tensorrt" in backends else None
    plan = _TENSORRT if why is None else _PLAN
    parts = {"python": _PYTHON, "onnxruntime": _IMPLICIT, "tensorrt": plan}
    size = human_bytes(manifest.contract.cache_bytes())
    head = f"# {name} for Triton\n\n{_OURS} the bundle of {manifest.source.name}.\n"
    return head + "".join(
        parts[backend].format(name=name, bytes=size, why=why) for backend in backends
    )


def add_page(folder: Path, repository: Path) -> None:
    """Put the page in a folder behind that of a repository, if that is ours or there is none.

    Args:
        folder: that has the page of the models which are added.
        repository: that they are added to.

    Raises:
        OSError: one cannot be read, or the whole not be written.
    """
    there, page = repository / PAGE, folder / PAGE
    before, new = there.read_bytes() if there.is_file() else b"", page.read_bytes()
    if (before and _OURS.encode() not in before) or new in before:
        return
    if before:
        page.write_bytes(before + b"\n" + new)
        sync(page)
    page.replace(there)
