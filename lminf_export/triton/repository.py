"""A model repository for Triton out of a bundle."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from lminf_export.bundle.destination import make_folder, remove_folder, temporary_name
from lminf_export.bundle.files import human_bytes, require_utf8
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.records import MANIFEST_NAME
from lminf_export.disk import require_path, user_path
from lminf_export.errors import ExportError, InputError, shown
from lminf_export.operator.settings import as_integer, require_one_of
from lminf_export.runtime.kernels import AUTO, find_kernels
from lminf_export.triton.configs import implicit_config, python_config, tensorrt_config
from lminf_export.triton.implicit_state import write_implicit_state
from lminf_export.triton.parameters import Parameters
from lminf_export.triton.readme import readme

Backend = Literal["python", "onnxruntime", "tensorrt"]
BACKENDS = get_args(Backend)
_VERSION = "1"
_SUFFIX: dict[str, str] = {"python": "", "onnxruntime": "_implicit", "tensorrt": "_tensorrt"}
_MODEL = '''"""The model that Triton's python backend runs; config.pbtxt tells of it."""

from lminf_export.triton.python_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def export_triton(
    bundle: str | Path,
    out: str | Path,
    *,
    backends: Sequence[Backend] = ("python",),
    name: str | None = None,
    slots: int = 8,
    parameters: Mapping[str, str] | None = None,
) -> Path:
    """Write a model repository that Triton serves.

    Files of the bundle are hard links where that can be, else copies. The folder is put in its
    place when all of it is written.

    Args:
        bundle: folder of a bundle.
        out: the repository, a folder that is not there or empty.
        backends: "python" runs our runtime, with streams, batching and sessions; "onnxruntime"
            the bare graph with implicit state; "tensorrt" the bundle's plan.
        name: of the model; the bundle's folder by default. Others have a suffix.
        slots: sequences side by side.
        parameters: further ones of the python backend, see docs/triton.md.

    Returns:
        The repository.

    Raises:
        InputError: an argument that is wrong, or a backend that the bundle has nothing for.
        BundleError: see `Bundle.open`.
        ExportError: the folder cannot be written.
    """
    require_path("out", out, InputError)
    slots = as_integer("slots", slots, 1, InputError)
    opened = Bundle.open(bundle)
    chosen = _backends(backends, opened)
    called = _name(opened, name)
    given = {"bundle": "bundle", "slots": str(slots), **(parameters or {})}
    Parameters.of(given)
    target = user_path(out, InputError)
    _require_free(target)
    partial = temporary_name(target, "partial", secrets.token_hex(4))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        make_folder(partial)
        for backend in chosen:
            model = called + _SUFFIX[backend]
            folder, at = partial / model, target.resolve() / model
            (folder / _VERSION).mkdir(parents=True)
            if backend == "python":
                _write_python(opened, folder, model, given)
            elif backend == "onnxruntime":
                _write_implicit(opened, folder, model, at, slots)
            else:
                _write_plan(opened, folder, model, at, slots)
        (partial / "README.md").write_text(
            readme(opened.manifest, called, chosen, human_bytes), encoding="utf-8"
        )
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if partial.exists():
            remove_folder(partial)
    return target


def _backends(backends: Sequence[Backend], bundle: Bundle) -> list[Backend]:
    """Return the backends, each once, if the bundle has something for them."""
    if isinstance(backends, str) or not isinstance(backends, Sequence) or not backends:
        raise InputError(f"backends={shown(backends)}: expected some of {', '.join(BACKENDS)}")
    for backend in backends:
        require_one_of("backends", backend, BACKENDS, InputError)
    if "tensorrt" in backends and bundle.plan_path is None:
        raise InputError(
            f"{bundle.path} has no plan: build one by lminf-export --out engine.plan, or leave "
            "tensorrt out"
        )
    if "onnxruntime" in backends and bundle.manifest.contract.dtype == "bfloat16":
        raise InputError("onnxruntime's backend takes no bfloat16; export with another --dtype")
    return list(dict.fromkeys(backends))


def _name(bundle: Bundle, given: str | None) -> str:
    """Return the model's name."""
    name = bundle.path.resolve().name if given is None else given
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(
            f"name={shown(name)}: a model's name has letters, digits, - and _; see --name"
        )
    return name


def _require_free(target: Path) -> None:
    require_utf8(target, ExportError)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} is no folder; name another one")
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(f"{target} is not empty; nothing was touched: name another folder")


def _write_python(bundle: Bundle, folder: Path, model: str, parameters: Mapping[str, str]) -> None:
    (folder / "config.pbtxt").write_text(python_config(model, parameters), encoding="utf-8")
    version = folder / _VERSION
    (version / "model.py").write_text(_MODEL, encoding="utf-8")
    for name in (*bundle.manifest.files, MANIFEST_NAME):
        _place(bundle.path / name, version / "bundle" / name)


def _write_implicit(bundle: Bundle, folder: Path, model: str, at: Path, slots: int) -> None:
    version = folder / _VERSION
    write_implicit_state(bundle, version / "model.onnx")
    for name in bundle.manifest.files_of("weights"):
        _place(bundle.path / name, version / name)
    kernels = find_kernels(AUTO, "cpu", bundle.manifest.kv_cache_dtype)
    path = None
    if kernels is not None:
        _place(kernels.path, version / kernels.path.name)
        path = str(at / _VERSION / kernels.path.name)
    text = implicit_config(model, bundle.manifest, slots, path)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")


def _write_plan(bundle: Bundle, folder: Path, model: str, at: Path, slots: int) -> None:
    version = folder / _VERSION
    assert bundle.plan_path is not None
    _place(bundle.plan_path, version / "model.plan")
    path = None
    if bundle.plugin_path is not None:
        _place(bundle.plugin_path, version / bundle.plugin_path.name)
        path = str(at / _VERSION / bundle.plugin_path.name)
    text = tensorrt_config(model, bundle.manifest, slots, path)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")


def _place(source: Path, target: Path) -> None:
    """Link a file, or copy it where the disk is another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
