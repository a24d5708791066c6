"""Checks free memory for caches."""

from __future__ import annotations

import psutil

from lminf_export.bundle.files import human_bytes
from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import SessionError
from lminf_export.runtime.session import Session


def require_memory(manifest: Manifest, session: Session | None, batch_size: int) -> None:
    """Refuse caches that would exceed this machine's free memory once they are full.

    Args:
        manifest: of the bundle.
        session: what runs it; one whose caches are not in main memory answers for itself.
        batch_size: B, streams side by side.

    Raises:
        SessionError: with both numbers.
    """
    if session is not None and not session.caches_in_main_memory:
        return
    require_free(manifest.cache_bytes_per_sequence * batch_size, batch_size)


def require_free(needed: int, batch_size: int) -> None:
    """Refuse caches that would exceed this machine's free memory.

    Args:
        needed: bytes of the caches once they are full.
        batch_size: B, streams side by side.

    Raises:
        SessionError: with both numbers.
    """
    memory = psutil.virtual_memory()
    if needed > memory.available:
        raise SessionError(
            f"the caches of {batch_size} stream{'s' if batch_size > 1 else ''} take "
            f"{human_bytes(needed)} when full, this machine has {human_bytes(memory.available)} "
            f"free of {human_bytes(memory.total)}; export with a smaller --window-size"
            + (" or use a smaller batch" if batch_size > 1 else "")
        )
