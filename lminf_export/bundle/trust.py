"""Which plans this user has agreed to run: asked once for each bundle, and remembered.

A plan, and the library beside it, are code. Their hashes in the manifest are no signature, since
whoever writes a bundle writes its manifest. What is remembered is the manifest's own hash, which
covers both, as the name of an empty file in a folder of the user's own.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import SessionError

logger = logging.getLogger(__name__)

_SHOWN = 16
# What was agreed to in this process and could not be kept.
_agreed: set[str] = set()


def trusted_folder() -> Path | None:
    """Return the folder of remembered hashes, or None where this user has no home."""
    configured = os.environ.get("XDG_CONFIG_HOME")
    try:
        base = Path(configured) if configured else Path.home() / ".config"
    except RuntimeError:  # no home is known
        return None
    return base / "lminf_export" / "trusted_plans"


def remember(manifest: Manifest) -> None:
    """Remember that this user runs a bundle's plan; where that fails, for this process only.

    Args:
        manifest: sealed; without an engine or its recipe there is nothing to remember.
    """
    if manifest.engine is None and manifest.engine_recipe is None:
        return
    folder = trusted_folder()
    try:
        if folder is None:
            raise FileNotFoundError(errno.ENOENT, "no home is known")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / manifest.manifest_sha256).touch()
    except OSError as error:
        _agreed.add(manifest.manifest_sha256)
        logger.info("cannot remember the plan beyond this process: %s", error.strerror)


def is_trusted(manifest: Manifest) -> bool:
    """Return whether this user has exported the bundle or has agreed to run its plan before."""
    if manifest.manifest_sha256 in _agreed:
        return True
    folder = trusted_folder()
    try:
        return (
            folder is not None
            and _belongs_to_the_user(folder)
            and (folder / manifest.manifest_sha256).is_file()
        )
    except OSError:
        return False


def require_trust(bundle: Bundle, trust: bool | str) -> None:
    """Let a bundle's plan pass if its user agreed to run it, and remember that.

    Args:
        bundle: opened and checked, so that plan and library are those of the manifest.
        trust: True to agree; a SHA-256 to agree to that bundle only, its manifest's or, where no
            library lies beside it, its plan's.

    Raises:
        SessionError: nobody agreed, or to another bundle.
    """
    manifest = bundle.manifest
    assert manifest.engine is not None, "asked for bundles with a plan"
    if isinstance(trust, str):
        require_hash(bundle, trust)
    elif not trust and not is_trusted(manifest):
        library = manifest.engine.plugin
        brings = f", and brings the library {library.file}" if library else ""
        raise SessionError(
            f"{manifest.engine.file} is code{brings}; its hash is no signature. If you trust who "
            "made this bundle, say so once: --trust-plan (trust_plan=True), or --trust-hash with "
            "the SHA-256 they published"
        )
    remember(manifest)


def require_hash(bundle: Bundle, expected: str) -> None:
    """Refuse a bundle that is not the one of a SHA-256 somebody vouched for.

    Raises:
        SessionError: it is another.
    """
    manifest = bundle.manifest
    vouching = {manifest.manifest_sha256}
    if manifest.engine is not None and bundle.plugin_path is None:
        vouching.add(manifest.files[manifest.engine.file].sha256)
    expected = expected.strip().lower()
    if expected not in vouching:
        raise SessionError(
            f"this is not the bundle of SHA-256 {expected[:_SHOWN]}…: manifest_sha256 in its "
            f"lminf.json is {manifest.manifest_sha256[:_SHOWN]}…; its plan was not loaded"
        )


def _belongs_to_the_user(folder: Path) -> bool:
    """Return whether nobody else can put a hash into a folder."""
    if not hasattr(os, "getuid"):
        return folder.is_dir()
    found = folder.stat()
    others = stat.S_IWGRP | stat.S_IWOTH
    if found.st_uid == os.getuid() and not found.st_mode & others:
        return True
    logger.warning("%s can be written by others, so nothing in it counts", folder)
    return False
