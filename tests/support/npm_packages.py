"""Packages of npm's registry, without npm: pinned, verified before unpacking, kept in a cache.

Node comes with playwright's Python package.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

_REGISTRY = "https://registry.npmjs.org"
_MAX_BYTES = 256 << 20
_SECONDS = 60
_TRIES = 3


def cache_folder() -> Path:
    """Return where fetched packages stay."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # Relative paths there are invalid by the specification.
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "lminf_export" / "tests"


def node() -> Path | None:
    """Return playwright's own node; None where playwright is not installed."""
    try:
        import playwright
    except ImportError:
        return None
    found = Path(playwright.__file__).parent / "driver" / "node"
    return found if found.is_file() else None


@dataclass(frozen=True)
class NpmPackage:
    """One release of a package.

    Attributes:
        name: with its scope.
        version: of the release.
        sha512: of its archive, in base64, as the registry lists it ("integrity").
    """

    name: str
    version: str
    sha512: str

    @property
    def kept(self) -> Path:
        """Where the package is, once it has been fetched."""
        digest = base64.b64decode(self.sha512).hex()[:16]
        return cache_folder() / f"{self.name.replace('/', '+')}-{self.version}-{digest}"

    def fetch(self) -> Path:
        """Return the folder of the package, fetched if it is not there yet.

        Raises:
            OSError: the registry cannot be reached.
            ValueError: what it sent is not the pinned archive.
        """
        if not self.kept.is_dir():
            archive = self._download()
            if hashlib.sha512(archive).digest() != base64.b64decode(self.sha512):
                raise ValueError(f"{self.name} {self.version}: not the archive that is pinned")
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.kept.parent) as folder:
                with tarfile.open(fileobj=io.BytesIO(archive)) as members:
                    members.extractall(folder, filter="data")
                put(Path(folder) / "package", self.kept)
        return self.kept

    def _download(self) -> bytes:
        base = self.name.rpartition("/")[2]
        url = f"{_REGISTRY}/{self.name}/-/{base}-{self.version}.tgz"
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(url, timeout=_SECONDS) as response:
                    return response.read(_MAX_BYTES)
            except OSError:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(2**attempt)
        raise AssertionError("the last attempt returns or raises")


def put(made: Path, target: Path) -> None:
    """Move a finished folder into place; another process may have been faster."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)
