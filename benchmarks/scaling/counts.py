"""Counts of a simulated fleet, and what is reported of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

QUANTILES = (0.5, 0.99)


class Counts:
    """Counts of turns that arrived behind the warm-up.

    Attributes:
        first: seconds to the first token, by where the state came from; of turns that had to be
            asked again, under "again", from the first time.
        events: everything that is counted, by name.
        network_bytes: of states moved, by "read" and "written".
    """

    def __init__(self) -> None:
        self.first: dict[str, list[float]] = {}
        self.events: Counter[str] = Counter()
        self.network_bytes: Counter[str] = Counter()

    def first_token(self, source: str, seconds: float) -> None:
        """Count a first token."""
        self.first.setdefault(source, []).append(seconds)

    def latencies(self) -> dict[str, Any]:
        """Return numbers and quantiles of the time to a first token, milliseconds."""
        every = [seconds for times in self.first.values() for seconds in times]
        return {
            name: {
                "turns": len(times),
                **{
                    f"p{quantile * 100:g}_ms": round(float(np.quantile(times, quantile)) * 1e3, 2)
                    for quantile in QUANTILES
                },
            }
            for name, times in [("all", every), *sorted(self.first.items())]
            if times
        }
