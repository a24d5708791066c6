"""The speed of a server on this machine, as `lminf bench` measures it."""

from __future__ import annotations

from pathlib import Path

from lminf_export.bench.measure import FAR, BenchOptions, bench
from lminf_export.capacity.options import ReplicaSpeed
from lminf_export.progress import Progress, silent
from lminf_export.runtime.kernels import AUTO

_PROMPT_TOKENS = 1024
_STEPS = 40


def measured_speed(
    bundle: str | Path,
    slots: int,
    *,
    threads: int | None = None,
    kernels: str = AUTO,
    progress: Progress = silent,
) -> ReplicaSpeed:
    """Measure steps of all slots with full rings, and the reading of one prompt.

    Args:
        bundle: the bundle's folder.
        slots: streams side by side.
        threads: of one operator; None leaves the choice to onnxruntime.
        kernels: what computes attention: see `load`.
        progress: called with the name of each measurement.

    Raises:
        BundleError, InputError, SessionError: see `bench`.
    """
    options = BenchOptions(
        batch_sizes=tuple(sorted({1, slots})),
        prefill_tokens=_PROMPT_TOKENS,
        decode_tokens=_STEPS,
        threads=threads,
        kernels=kernels,
        positions=(FAR,),
    )
    report = bench(bundle, options, progress)
    [step] = [row for row in report.decode if row.batch_size == slots]
    return ReplicaSpeed(
        tokens_per_second=slots * 1e3 / step.ms_per_step,
        prompt_tokens_per_second=report.prefill[0].tokens_per_second,
        source="measured",
    )
