"""The attention layers that are timed: those of the project's targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FULL_CONTEXT = 32768


@dataclass(frozen=True)
class Workload:
    """One attention layer and how many tokens a step brings.

    Attributes:
        name: as the table shows it.
        batch: rows.
        heads: query heads.
        kv_heads: key/value heads.
        steps: new tokens of every row.
        head_dim: D.
        window_size: W.
        num_sink_tokens: N.
        full_context: keys of the full attention compared with; 0 for none.
        dtype: of queries, keys and values.
        int8_rings: the rings hold int8.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    steps: int = 1
    head_dim: int = 128
    window_size: int = 4096
    num_sink_tokens: int = 16
    full_context: int = 0
    dtype: torch.dtype = torch.float16
    int8_rings: bool = False

    @property
    def keys(self) -> int:
        """Keys that every query sees."""
        return self.window_size + self.num_sink_tokens

    @property
    def key_bytes(self) -> int:
        """Bytes of keys and values that a step has to read."""
        visible = self.keys + self.steps - 1
        return 2 * 2 * self.batch * self.kv_heads * visible * self.head_dim

    @property
    def flops(self) -> int:
        """Operations of both products over visible pairs."""
        return 4 * self.batch * self.heads * self.steps * self.keys * self.head_dim


def workloads() -> list[Workload]:
    """Return the workloads of the project's targets: heads of Llama-2-7B and Llama-3-8B."""
    heads = {"Llama-2-7B": (32, 32), "Llama-3-8B": (32, 8)}
    decode = [
        Workload(f"decode {model} B={batch}", batch, *sizes, full_context=FULL_CONTEXT)
        for model, sizes in heads.items()
        for batch in (1, 8, 64)
    ]
    # 64 rows of 32 key heads at 32k keys take 32 GiB a layer: full attention is timed up to B = 8.
    decode = [replace(w, full_context=0) if w.batch == 64 else w for w in decode]
    chunk = [
        Workload(f"prefill {model} chunk 1024", 1, *sizes, steps=1024)
        for model, sizes in heads.items()
    ]
    return decode + chunk


def small_workload() -> Workload:
    """Something that the block emulation does in a second."""
    return Workload("small", 1, 2, 1, head_dim=64, window_size=64, full_context=128)
