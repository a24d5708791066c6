"""How a bundle is written: whole or not at all.

Files go into a hidden folder beside the destination, are hashed and synced, described by
`lminf.json` last, and renamed into place. Whatever interrupts that removes the hidden folder;
what a kill -9 leaves behind has another name, and the next export to the same place clears it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType, TracebackType

from lminf_export.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Progress,
    Role,
    check_file_name,
    file_sha256,
    human_bytes,
)
from lminf_export.errors import ExportError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system: folders cannot be locked, abandoned ones stay
    fcntl = None

logger = logging.getLogger(__name__)

DEFAULT_GRAPH_NAME = "model.onnx"
_PRODUCTS = {".plan": "an engine", ".onnx": "a graph"}
# What people mean as a file's type; ".1-8b" or ".3" is part of a model's name.
_FILE_TYPE = re.compile(r"\.[A-Za-z][A-Za-z0-9]*")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class OutTarget:
    """Where an export goes.

    Attributes:
        directory: the bundle's folder.
        graph_name: file name of the ONNX graph in it.
        engine_name: file name of the engine's plan, None if no engine is asked for.
    """

    directory: Path
    graph_name: str = DEFAULT_GRAPH_NAME
    engine_name: str | None = None


def parse_out(out: str | Path) -> OutTarget:
    """Read an `--out`: a folder, or the product that is to be written last into a folder.

    `DIR` and `DIR/` are that folder. `DIR/NAME.plan` is the folder DIR with an engine of that
    name, `DIR/NAME.onnx` with a graph of that name; without DIR the folder is `./NAME/`.
    Any other file type is refused. A suffix counts as a file type when it is letters and
    digits that begin with a letter: `out.xyz` is refused, `out-3.1` and `llama-3.1-8b` are
    folders, and a trailing slash makes any name a folder.

    Raises:
        ExportError: for an empty name or an unknown file type.
    """
    text = os.fspath(out)
    path = Path(text)
    if not text.strip() or "\0" in text:
        raise ExportError(f"--out {text!r}: must name a folder, or a .plan or .onnx file in one")
    if text.endswith(("/", os.sep)) or not _FILE_TYPE.fullmatch(path.suffix):
        return OutTarget(path)
    if path.suffix not in _PRODUCTS:
        raise ExportError(
            f"--out {text}: cannot write a {path.suffix} file; name a folder, NAME.onnx for a "
            f"graph or NAME.plan for an engine (a folder of that name: {text}/)"
        )
    directory = path.parent if path.parent != Path() else Path(path.stem)
    if path.suffix == ".plan":
        return OutTarget(directory, engine_name=path.name)
    return OutTarget(directory, graph_name=path.name)


class BundleWriter:
    """Writes one bundle; use as a context manager and call `commit` at the end of the block.

    Args:
        directory: the bundle's folder; it and its parents may be missing.
        force: replace a bundle that is there already.

    Raises:
        ExportError: on entering, if the destination is taken; within, for a full disk, in
            one line with the numbers. An OSError of another kind passes through.
    """

    def __init__(self, directory: str | Path, *, force: bool = False) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.force = force
        self._token = secrets.token_hex(4)
        self._temporary = self.directory.parent / f".{self.directory.name}.partial-{self._token}"
        self._roles: dict[str, Role] = {}
        self._digests: dict[str, str] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> BundleWriter:
        check_destination(self.directory, force=self.force)
        with ExitStack() as stack:
            stack.enter_context(_terminated_as_exit())
            _make_parents(self.directory.parent, stack)
            _remove_abandoned(self.directory)
            _mkdir(self._temporary)
            stack.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            stack.enter_context(_locked(self._temporary))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        full = isinstance(error, OSError) and error.errno in _NO_SPACE
        needed, free = self._bytes_written(), _free_bytes(self._temporary)
        self._cleanup.close()
        if full:
            raise ExportError(
                f"no space left for {self.directory}: {human_bytes(needed)} were written and "
                f"{human_bytes(free)} are free on that disk; free some or choose another --out"
            ) from error

    def add(self, name: str, role: Role) -> Path:
        """Announce a file and return the path to write it to.

        Args:
            name: plain relative name, "/" between folders.
            role: what it is for.
        """
        try:
            check_file_name(name)
        except ValueError as error:
            raise ExportError(f"cannot put a file into the bundle: {error}") from None
        self._roles[name] = role
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def set_digest(self, name: str, sha256: str) -> None:
        """Tell a file's SHA-256, computed while it was written: `commit` will not read it again."""
        self._digests[name] = sha256

    def require_space(self, num_bytes: int) -> None:
        """Raise ExportError now if the disk cannot take num_bytes more bytes."""
        free = _free_bytes(self._temporary)
        if num_bytes > free:
            raise ExportError(
                f"no space for {self.directory}: it needs {human_bytes(num_bytes)}, "
                f"{human_bytes(free)} are free on that disk; free some or choose another --out"
            )

    def commit(self, draft: Manifest, progress: Progress | None = None) -> Manifest:
        """Hash and sync every file, write `lminf.json`, and rename the folder into place.

        Args:
            draft: from `new_manifest`; its file table and hash are filled in.
            progress: told of the bytes hashed.

        Returns:
            The sealed manifest; the bundle is at `directory`.
        """
        missing = sorted({draft.graph, *_engine_files(draft)} - self._roles.keys())
        assert not missing, f"the manifest names {missing}, which were never added"
        manifest = draft.sealed({name: self._entry(name, progress) for name in self._roles})
        self._assert_nothing_else()
        path = self._temporary / MANIFEST_NAME
        path.write_text(manifest.to_json(), encoding="utf-8")
        _sync(path)
        for folder in [p for p in self._temporary.rglob("*") if p.is_dir()]:
            _sync(folder)
        _sync(self._temporary)
        self._move_into_place()
        return manifest

    def _entry(self, name: str, progress: Progress | None) -> FileEntry:
        path = self._temporary / name
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{name} was not written into the bundle as a plain file")
        _sync(path)
        size, digest = path.stat().st_size, self._digests.get(name)
        if digest is None:
            digest = file_sha256(path, progress)
        return FileEntry(bytes=size, sha256=digest, role=self._roles[name])

    def _assert_nothing_else(self) -> None:
        found = {p.relative_to(self._temporary).as_posix() for p in _files(self._temporary)}
        assert found == set(self._roles), f"unannounced files: {sorted(found - set(self._roles))}"

    def _move_into_place(self) -> None:
        check_destination(self.directory, force=self.force)
        old = self.directory.with_name(f".{self.directory.name}.replaced-{self._token}")
        replaces = self.directory.exists() and any(self.directory.iterdir())
        try:
            if replaces:
                os.rename(self.directory, old)
            os.rename(self._temporary, self.directory)
        except BaseException:
            if old.exists() and not self.directory.exists():
                os.rename(old, self.directory)
            raise
        self._cleanup.callback(shutil.rmtree, old, ignore_errors=True)
        _sync(self.directory.parent)

    def _bytes_written(self) -> int:
        with contextlib.suppress(OSError):
            return sum(p.stat().st_size for p in _files(self._temporary))
        return 0


def check_destination(directory: Path, *, force: bool) -> None:
    """Raise ExportError if a bundle cannot be put there; an empty folder is as good as none."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; name a folder, or remove it")
    if directory.is_symlink():
        raise ExportError(f"{directory} is a link; name the folder it points to")
    if directory == Path.cwd():
        raise ExportError(f"{directory} is the current folder; name a folder inside it")
    if os.path.ismount(directory):
        raise ExportError(
            f"{directory} is a mount point and cannot be replaced in one go; "
            f"name a folder inside it, such as {directory / 'bundle'}"
        )
    if (directory / MANIFEST_NAME).is_file():
        if not force:
            raise ExportError(f"{directory} is a bundle already; --force replaces it")
    elif any(directory.iterdir()):
        raise ExportError(
            f"{directory} exists and is not a bundle; nothing was touched: name another folder"
        )


def _engine_files(manifest: Manifest) -> list[str]:
    engine, recipe = manifest.engine, manifest.engine_recipe
    names = [recipe.graph] if recipe else []
    if engine:
        names.append(engine.file)
        names += [engine.plugin.file] if engine.plugin else []
    return names


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def _free_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path).free
    return 0


def _mkdir(path: Path) -> None:
    try:
        path.mkdir()
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise
        raise ExportError(f"cannot write to {path.parent}: {error.strerror}") from None


def _make_parents(parent: Path, stack: ExitStack) -> None:
    """Make missing folders; a failed export takes the empty ones away again."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    if not parent.is_dir():
        raise ExportError(f"cannot write to {parent}: it is not a folder")
    for folder in reversed(missing):
        _mkdir(folder)
        stack.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove_abandoned(directory: Path) -> None:
    """Clear what killed exports to this place left; a running one holds a lock."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(directory.name)}\.(partial|replaced)-[0-9a-f]{{8}}")
    for path in directory.parent.iterdir():
        if pattern.fullmatch(path.name) is None or not path.is_dir():
            continue
        # A replaced bundle is only spare while the one that replaced it is there.
        if ".replaced-" in path.name and not directory.exists():
            continue
        with contextlib.suppress(OSError), _locked(path):
            logger.warning("removing %s, left by an interrupted export", path)
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; OSError if another process holds it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that cleaning up happens."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
    before = {n: signal.signal(n, leave) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
