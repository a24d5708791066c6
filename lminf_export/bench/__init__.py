"""How fast a bundle runs here, and how far that is from what the memory allows."""

from lminf_export.bench.measure import BenchOptions, bench
from lminf_export.bench.report import BenchReport

__all__ = ["BenchOptions", "BenchReport", "bench"]
