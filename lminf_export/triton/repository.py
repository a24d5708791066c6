"""A model repository for Triton out of a bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lminf_export.bundle.copying import copy_file
from lminf_export.bundle.destination import (
    make_parents,
    remove_abandoned,
    temporary_folder,
    terminated_as_exit,
)
from lminf_export.bundle.files import sync
from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.records import MANIFEST_NAME
from lminf_export.disk import require_path
from lminf_export.errors import ExportError, InputError, shown
from lminf_export.operator.settings import as_integer
from lminf_export.runtime.kernels import AUTO, find_kernels
from lminf_export.triton.arguments import (
    BUNDLE,
    checked_backends,
    checked_name,
    checked_parameters,
    require_in_bundle,
)
from lminf_export.triton.configs import implicit_config, python_config, tensorrt_config
from lminf_export.triton.destination import CONFIG, checked_repository, put, require_new
from lminf_export.triton.implicit_state import write_implicit_state
from lminf_export.triton.interface import Backend
from lminf_export.triton.plans import why_not_tensorrt_backend
from lminf_export.triton.readme import PAGE, readme

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
    link: bool = False,
) -> Path:
    """Write a model repository that Triton serves, or add models to one.

    All of the bundle's files are checked by their hashes, and copied. The folder, or each model's
    in a repository that has others, is put in its place when all is written.

    Args:
        bundle: folder of a bundle.
        out: the repository: a folder that is not there, is empty, or has other models.
        backends: "python" runs our runtime, with streams, batching and sessions; "onnxruntime"
            the bare graph with implicit state; "tensorrt" the bundle's plan: in Triton's own
            TensorRT backend where that can run it, else by our runtime in the python backend, as
            plans that update caches in place need it, which all of today do.
        name: of the model; the bundle's folder by default. Others have a suffix.
        slots: sequences side by side.
        parameters: further ones of the python backend, see docs/triton.md.
        link: weights are hard links and take no second place on the disk. Who writes to one
            of the two then writes to both, and onnx refuses to load weights with several links,
            of the bundle too.

    Returns:
        The repository.

    Raises:
        InputError: an argument that is wrong, or a backend that the bundle has nothing for.
        BundleError: see `Bundle.open`.
        SessionError: kernels, or a hash of trust, that are not those of the bundle.
        ExportError: the folder cannot be written.
    """
    folders = write_models(
        bundle, out, backends=backends, name=name, slots=slots, parameters=parameters, link=link
    )
    return folders[0].parent


def write_models(
    bundle: str | Path,
    out: str | Path,
    *,
    backends: Sequence[Backend],
    name: str | None,
    slots: int,
    parameters: Mapping[str, str] | None,
    link: bool,
) -> list[Path]:
    """Do what `export_triton` does, with its arguments; return each model's folder.

    Raises:
        LminfError: as there.
    """
    require_path("out", out, InputError)
    if not isinstance(link, bool):
        raise InputError(f"link={shown(link)}: must be True or False")
    slots = as_integer("slots", slots, 1, InputError)
    chosen = checked_backends(backends)
    given = checked_parameters(parameters, chosen, slots)
    if name is not None:
        checked_name(name)
    target = checked_repository(out)
    opened = Bundle.open(bundle, verify="full")
    called = checked_name(opened.path.resolve().name if name is None else name)
    if target.resolve().is_relative_to(opened.path.resolve()):
        raise ExportError(f"{target} is in the bundle {opened.path}; name a folder outside of it")
    require_in_bundle(opened, chosen, slots, given)
    models = {backend: called + _SUFFIX[backend] for backend in chosen}
    require_new(target, list(models.values()))
    export = _Export(opened, slots, given, link)
    try:
        with ExitStack() as stack:
            stack.enter_context(terminated_as_exit())
            make_parents(target.parent, stack)
            remove_abandoned(target)
            partial = temporary_folder(target, stack)
            for backend, model in models.items():
                (partial / model / _VERSION).mkdir(parents=True)
                export.write(backend, model, partial / model, target / model)
            page = readme(opened.manifest, called, chosen)
            (partial / PAGE).write_text(page, encoding="utf-8")
            for path in (*partial.rglob("*"), partial):
                sync(path)
            put(partial, target, list(models.values()))
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from None
    return [target / model for model in models.values()]


@dataclass(frozen=True)
class _Export:
    """Of these the models of a repository are made."""

    bundle: Bundle
    slots: int
    parameters: dict[str, str]
    link: bool

    def write(self, backend: Backend, model: str, folder: Path, at: Path) -> None:
        """Write a model.

        Args:
            backend: that runs it.
            model: its name.
            folder: to write to; it has the folder of the version.
            at: where that will be.
        """
        version = folder / _VERSION
        if backend == "python":
            config = self._python(model, version)
        elif backend == "onnxruntime":
            config = self._implicit(model, version, at / _VERSION)
        else:
            config = self._plan(model, version, at / _VERSION)
        (folder / CONFIG).write_text(config, encoding="utf-8")

    def _python(self, model: str, version: Path, note: str = "") -> str:
        parameters = dict(self.parameters)
        if note:
            assert self.bundle.manifest.engine is not None, "asked for bundles with a plan"
            parameters[BUNDLE] = f"{BUNDLE}/{self.bundle.manifest.engine.file}"
        if parameters[BUNDLE] != BUNDLE:
            # Whoever exports it trusts this plan, and the server may run as another user.
            parameters.setdefault("trust_hash", self.bundle.manifest.manifest_sha256)
        (version / "model.py").write_text(_MODEL, encoding="utf-8")
        for name in (*self.bundle.manifest.files, MANIFEST_NAME):
            self._place(name, version / BUNDLE / name)
        return python_config(model, parameters, note)

    def _implicit(self, model: str, version: Path, at: Path) -> str:
        manifest = self.bundle.manifest
        write_implicit_state(self.bundle, version / "model.onnx")
        for name in manifest.files_of("weights"):
            self._place(name, version / name)
        asked = self.parameters.get("kernels", AUTO)
        kernels = find_kernels(asked, "cpu", manifest.kv_cache_dtype)
        library = None
        if kernels is not None:
            copy_file(kernels.path, version / kernels.path.name)
            library = str(at / kernels.path.name)
        return implicit_config(model, manifest, self.slots, library)

    def _plan(self, model: str, version: Path, at: Path) -> str:
        why = why_not_tensorrt_backend(self.bundle.manifest)
        if why is not None:
            return self._python(model, version, why)
        plan, plugin = self.bundle.plan_path, self.bundle.plugin_path
        assert plan is not None, "asked for bundles with a plan"
        copy_file(plan, version / "model.plan")
        library = None
        if plugin is not None:
            copy_file(plugin, version / plugin.name)
            library = str(at / plugin.name)
        return tensorrt_config(model, self.bundle.manifest, self.slots, library)

    def _place(self, name: str, target: Path) -> None:
        """Copy a file of the bundle, or link it if it is asked for and has weights."""
        source = self.bundle.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.link or name not in self.bundle.manifest.files_of("weights"):
            copy_file(source, target)
            return
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise ExportError(
                f"cannot link {source} into the repository: {error.strerror}; leave --link out"
            ) from None
