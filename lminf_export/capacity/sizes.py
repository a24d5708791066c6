"""Bytes of slots and of parked sessions, which follow from a bundle's caches alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lminf_export.bundle.manifest import Manifest
from lminf_export.runtime.parking.seal import OVERHEAD
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.snapshot_memory import cache_table
from lminf_export.serve.state_store import ENTRY_BYTES

# The record of a conversation in a state's file: its history's hash, what is unread, and its
# system prompt, as far as that is no longer than a page.
RECORD_BYTES = 8192
# Digits of the largest place of an array in a file.
_DIGITS = 20


@dataclass(frozen=True)
class StateSizes:
    """Sizes of one bundle's states.

    Attributes:
        manifest: of the bundle.
        header_bytes: of a state's file besides its caches, at most, without a record.
    """

    manifest: Manifest
    header_bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> StateSizes:
        """Measure the header of a state that has read nothing; places grow by digits."""
        contract = manifest.contract
        table = cache_table(contract)
        caches = {
            row.name: np.zeros((1, row.num_kv_heads, row.used(0), row.row), row.dtype)
            for row in table
        }
        empty = Snapshot(contract, np.zeros(1, np.int64), caches, manifest.state_id)
        header = len(empty.to_bytes()) - empty.nbytes
        return cls(manifest, header + 3 * _DIGITS * len(table) + _DIGITS)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: what the caches of one sequence take when every ring is full."""
        return self.manifest.cache_bytes_per_sequence

    @property
    def full_at(self) -> int:
        """Tokens behind which a state does not grow any more."""
        return self.manifest.contract.ring_capacities[-1]

    def state_bytes(self, tokens: int) -> int:
        """Return the bytes of a snapshot of one stream that has read so many tokens."""
        contract = self.manifest.contract
        return contract.cache_bytes({size: min(size, tokens) for size in contract.ring_capacities})

    def kept_bytes(self, tokens: int) -> int:
        """Return what a server counts for a conversation in memory, without its system prompt."""
        return self.state_bytes(tokens) + ENTRY_BYTES

    def stored_bytes(self, tokens: int) -> int:
        """Return the bytes of a parked session's file or object, at most: sealed, with a record."""
        return self.state_bytes(tokens) + self.header_bytes + RECORD_BYTES + OVERHEAD
