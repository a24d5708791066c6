"""onnxruntime's own profile of what a session runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from lminf_export.runtime.options import Provider
from lminf_export.runtime.session import Session


def record_profile(
    bundle: Bundle,
    use: Callable[[Session], None],
    *,
    provider: Provider = "cpu",
    threads: int | None = None,
    kernels: str | Path = AUTO,
) -> list[dict[str, Any]]:
    """Open a session under onnxruntime's profiler, use it, and return the profile's events.

    Args:
        bundle: opened and checked.
        use: runs the steps to be profiled.
        provider: see `load`, as for the settings that follow it.
        threads: see `load`.
        kernels: see `load`.

    Raises:
        SessionError: the bundle does not run here.
    """
    with tempfile.TemporaryDirectory(prefix="lminf-") as folder:
        session = OnnxRuntimeSession(
            bundle,
            provider=provider,
            threads=threads,
            kernels=kernels,
            profile=Path(folder) / "profile",
        )
        use(session)
        text = session.end_profiling().read_text(encoding="utf-8")
    events: list[dict[str, Any]] = json.loads(text)
    return events
