"""An exported folder, opened and checked; `writer` writes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lminf_export.bundle.destination import is_temporary, replaced_folders
from lminf_export.bundle.files import HashProgress, file_sha256, require_utf8
from lminf_export.bundle.links import stays_inside
from lminf_export.bundle.manifest import Manifest, read_manifest
from lminf_export.bundle.records import MANIFEST_NAME, FileEntry
from lminf_export.disk import is_file, onnx_files, require_path
from lminf_export.errors import BundleError, shortened
from lminf_export.operator.settings import require_one_of

Verify = Literal["fast", "full"]
# What decides what runs is hashed on every opening; weights only on request.
_ALWAYS_HASHED = ("graph", "plan", "plugin")


@dataclass(frozen=True)
class Bundle:
    """An opened and checked bundle.

    Attributes:
        path: its folder.
        manifest: what `lminf.json` says.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, path: str | Path, verify: Verify = "fast", progress: HashProgress | None = None
    ) -> Bundle:
        """Open a bundle and check it.

        Args:
            path: the folder, or a file directly in it.
            verify: "fast" hashes manifest, graph, plan and plugin and checks that every other
                file is there in its size; "full" hashes every file.
            progress: called with each file's name and the bytes hashed.

        Raises:
            BundleError: naming the file, what was expected, what was found, what to do.
        """
        require_one_of("verify", verify, get_args(Verify), BundleError)
        folder = bundle_folder(path)
        manifest_path = folder / MANIFEST_NAME
        try:
            _require_inside(manifest_path, folder)
            manifest = read_manifest(manifest_path.read_bytes(), str(manifest_path))
        except OSError as error:
            raise BundleError(f"cannot read {manifest_path}: {error.strerror}") from None
        bundle = cls(folder, manifest)
        bundle._check_named_files()
        for name, entry in manifest.files.items():
            hashed = verify == "full" or entry.role in _ALWAYS_HASHED
            bundle._check_file(name, entry, hashed, progress)
        return bundle

    @property
    def graph_path(self) -> Path:
        """The ONNX graph."""
        return self.path / self.manifest.graph

    @property
    def plan_path(self) -> Path | None:
        """The engine's plan, if one was built."""
        engine = self.manifest.engine
        return self.path / engine.file if engine else None

    @property
    def plugin_path(self) -> Path | None:
        """The library the plan needs, unless the plan carries it."""
        plugin = self.manifest.engine.plugin if self.manifest.engine else None
        return self.path / plugin.file if plugin and not plugin.embedded else None

    @property
    def tokenizer_path(self) -> Path | None:
        """`tokenizer.json`, if the model has one."""
        name = "tokenizer.json"
        return self.path / name if name in self.manifest.files else None

    def _check_named_files(self) -> None:
        manifest = self.manifest
        wanted = [("graph", manifest.graph)]
        if manifest.engine:
            wanted.append(("plan", manifest.engine.file))
            plugin = manifest.engine.plugin
            if plugin:
                wanted.append(("plugin", plugin.file))
        if manifest.engine_recipe:
            wanted.append(("engine_graph", manifest.engine_recipe.graph))
        for role, name in wanted:
            entry = manifest.files.get(name)
            if entry is None or entry.role != role:
                raise BundleError(
                    f"{self.path / MANIFEST_NAME} names {name} as its {role} but does not list "
                    "it among its files; export the model again"
                )
        self._check_plugin_hash()

    def _check_plugin_hash(self) -> None:
        """The plan was built with one plugin; another one of that name will not do."""
        plugin = self.manifest.engine.plugin if self.manifest.engine else None
        if plugin is None:
            return
        found = self.manifest.files[plugin.file].sha256
        if found != plugin.sha256:
            raise BundleError(
                f"{self.path / MANIFEST_NAME}: the plan needs {plugin.file} of SHA-256 "
                f"{plugin.sha256[:16]}…, the bundle lists {found[:16]}…; build the plan again"
            )

    def _check_file(
        self, name: str, entry: FileEntry, hashed: bool, progress: HashProgress | None
    ) -> None:
        path = self.path / name
        if not is_file(path):
            raise BundleError(f"{path} is missing; export the model again or copy the whole bundle")
        try:
            _require_inside(path, self.path)
            size = path.stat().st_size
            if size != entry.bytes:
                raise BundleError(
                    f"{path} has {size} bytes, the manifest says {entry.bytes}; "
                    "it is truncated or altered: copy it again or export the model again"
                )
            found = file_sha256(path, progress) if hashed else entry.sha256
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}") from None
        if found != entry.sha256:
            raise BundleError(
                f"{path} was altered: its SHA-256 is {found[:16]}…, the manifest says "
                f"{entry.sha256[:16]}…; copy it again or export the model again"
            )


def bundle_folder(path: str | Path) -> Path:
    """Return the folder of a bundle given as the folder or as a file in it.

    Raises:
        BundleError: if there is no bundle.
    """
    require_path("path", path, BundleError)
    path = Path(path)
    require_utf8(path, BundleError)
    try:
        if not path.exists():
            raise BundleError(_nothing_there(path))
        folder = path if path.is_dir() else path.parent
        if is_temporary(folder.resolve()):
            raise BundleError(
                f"{folder} is not a bundle: an export that runs, or was interrupted, works in it; "
                "open the folder the export was to write, or export again"
            )
        has_manifest = (folder / MANIFEST_NAME).is_file()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from None
    if not has_manifest:
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST_NAME}; {_way_to_one(folder)}"
        )
    return folder


def _way_to_one(folder: Path) -> str:
    """Say how a bundle is made of what is there."""
    if graphs := onnx_files(folder):
        graph = shortened(graphs[0].relative_to(folder).as_posix(), 40)
        return f"it holds an ONNX model, {graph}; make a bundle of that by lminf-export --model"
    return "write one with lminf-export"


def _nothing_there(path: Path) -> str:
    moved = replaced_folders(path)
    if moved:
        return (
            f"{path} does not exist: an export was killed while it replaced it; mv {moved[0]} back"
        )
    return f"{path} does not exist; expected a bundle written by lminf-export"


def _require_inside(path: Path, folder: Path) -> None:
    if not stays_inside(path, folder):
        raise BundleError(f"{path} is a link to outside the bundle; copy the file itself")
