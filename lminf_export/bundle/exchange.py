"""Two folders change places in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Flags and the stand-in for the current folder, of Linux' renameat2 and of macOS' renameatx_np.
_SWAP = 2
_CURRENT_FOLDER = {"linux": -100, "darwin": -2}
_FUNCTIONS = {"linux": "renameat2", "darwin": "renameatx_np"}
# What a kernel, a filesystem (overlays say EXDEV) or a sandbox that cannot do it says.
_UNABLE = (
    *(errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM),
)


def exchange(left: Path, right: Path) -> bool:
    """Give each of two folders the other's name; nobody ever sees one of the names missing.

    Args:
        left, right: absolute paths on one filesystem; both exist.

    Returns:
        Whether it was done; False where the kernel or the filesystem does not know how, and
        then nothing has changed.

    Raises:
        OSError: it knows how, and failed.
    """
    function = _system_call()
    if function is None:
        return False
    here = _CURRENT_FOLDER[sys.platform]
    if function(here, os.fsencode(left), here, os.fsencode(right), _SWAP) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(right))


def _system_call() -> Callable[..., int] | None:
    name = _FUNCTIONS.get(sys.platform)
    if name is None:
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return None
    function.argtypes = [
        *(ctypes.c_int, ctypes.c_char_p),
        *(ctypes.c_int, ctypes.c_char_p),
        ctypes.c_uint,
    ]
    function.restype = ctypes.c_int
    return function
