"""Memory that a process may still take: of the machine, of its container, of its own limit."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_GROUP = Path("/sys/fs/cgroup")
_CACHE_LINES = ("active_file", "inactive_file")


def available_memory() -> int:
    """Return the bytes that can be allocated without swapping or being killed."""
    return max(0, min(psutil.virtual_memory().available, _group_rest(), _limit_rest()))


def _group_rest() -> int:
    """Return what the control group leaves; its own page cache counts as free."""
    most = 2**63
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        lines = (_GROUP / "memory.stat").read_text().splitlines()
        cached = [int(x.split()[1]) for x in lines if x.split()[0] in _CACHE_LINES]
        most = limit - used + sum(cached)
    return most


def _limit_rest() -> int:
    """Return what the process's limit of address space leaves."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 2**63
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return 2**63
    return int(limit) - psutil.Process().memory_info().vms
