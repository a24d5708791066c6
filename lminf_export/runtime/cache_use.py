"""Whether an engine with the plugin updates its caches in place, as the plugin itself saw it.

TensorRT's header says of tensors that a plugin updates in place that it "may insert copies". They
show in the addresses that the plugin is given: past and present at two of them, and its kernels
copy; at one that is not the session's, and TensorRT copies to and fro.

Not yet executed on a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# How a plan's caches come to be updated in place: the plugin declares past and present as one
# tensor, or TensorRT is told nothing and the session binds both names to one address.
DECLARED, BOUND = "declared", "bound"
CACHE_ALIASING = (DECLARED, BOUND)

# An address of a cache's past and of its present.
Pair = tuple[int, int]


@dataclass(frozen=True)
class CacheUse:
    """How one step of an engine updated its caches.

    Attributes:
        caches: how many the step had to update.
        copied: of these, past and present were at two addresses: the plugin's kernels copied.
        moved: of these, both were at one address that is not the session's: TensorRT copied.
    """

    caches: int
    copied: int
    moved: int

    @property
    def in_place(self) -> int:
        """Caches that nothing copied."""
        return self.caches - self.copied - self.moved

    @property
    def description(self) -> str:
        """The record as one phrase."""
        if self.in_place == self.caches:
            return f"all {self.caches} in place"
        by = [(self.copied, "copied by the plugin"), (self.moved, "copied by TensorRT")]
        parts = [f"{count} {what}" for count, what in by if count]
        return f"{self.in_place} of {self.caches} in place, {', '.join(parts)}"


def cache_use(seen: Sequence[Pair], bound: Sequence[int]) -> CacheUse | None:
    """Compare what the plugin was given with what the session bound.

    Args:
        seen: past and present of every cache of one step, as the plugin saw them.
        bound: the address of every cache, past and present being one.

    Returns:
        None if the plugin did not see as many caches as there are, and so cannot tell.
    """
    if len(seen) != len(bound):
        return None
    copied = sum(past != present for past, present in seen)
    own = set(bound)
    moved = sum(past == present and past not in own for past, present in seen)
    return CacheUse(len(bound), copied, moved)


class CacheRecorder:
    """The plugin's library that TensorRT has loaded, asked where its caches are."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._record = library.lminfRecordCaches
        self._record.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
        self._record.restype = None

    @contextmanager
    def recorded(self, room: int) -> Iterator[list[Pair]]:
        """Collect the caches of what this thread enqueues; the list is filled at the end.

        Args:
            room: the caches to expect; more are counted as pairs of zeros.
        """
        pairs: list[Pair] = []
        addresses, count = (ctypes.c_void_p * (2 * room))(), ctypes.c_uint64(0)
        self._record(ctypes.addressof(addresses), room, ctypes.addressof(count))
        try:
            yield pairs
        finally:
            self._record(None, 0, None)
        flat = [address or 0 for address in addresses]
        pairs += zip(flat[::2][: count.value], flat[1::2][: count.value], strict=True)
        pairs += [(0, 0)] * (count.value - len(pairs))


def find_recorder(path: Path | None) -> CacheRecorder | str:
    """Return the recorder of a library that this process has loaded, or why there is none.

    Args:
        path: of the library; None if it is inside the plan.
    """
    if path is None:
        return "the plugin is inside the plan"
    if not hasattr(os, "RTLD_NOLOAD"):
        return "this system does not say which libraries are loaded"
    try:
        # Only what TensorRT has loaded counts, and nothing is loaded here.
        library = ctypes.CDLL(str(path.resolve()), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        return CacheRecorder(library)
    except OSError:
        return "TensorRT has loaded the plugin from another place"
    except AttributeError:
        return "the plugin was built before it could tell"
