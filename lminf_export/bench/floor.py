"""The least a decoding step can take: every byte it must read, at the speed memory streams."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import onnx_ir as ir

from lminf_export.bundle.folder import Bundle

_BUFFER_BYTES = 2**28  # far larger than any cache of a processor
_ROUNDS = 7
_LOOKUPS = ("Gather", "GatherBlockQuantized")


def streaming_bandwidth(threads: int) -> float:
    """Return the bytes per second at which so many threads read main memory, the best of a few."""
    buffer = np.arange(_BUFFER_BYTES // 8)
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def weight_bytes_per_step(bundle: Bundle, batch_size: int) -> int:
    """Return the bytes of weights one decoding step reads, each once.

    Of a table that is only looked up, a row for each stream counts; of a stack of experts, as
    many as the step's tokens choose at most.
    """
    total = 0
    chosen = _experts_per_token(bundle) * batch_size
    model = ir.load(bundle.graph_path)
    seen: set[tuple[str, int]] = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        place = (str(tensor.location), tensor.offset or 0)
        rows = int(tensor.shape.numpy()[0]) if tensor.shape.rank() else 1
        if not all(_is_lookup(node, index) for node, index in value.uses()):
            # The same bytes under two names are read once.
            total += 0 if place in seen else tensor.nbytes
        elif len(tensor.shape) > 2:
            total += tensor.nbytes * min(chosen, rows) // rows
        else:
            total += tensor.nbytes // rows * batch_size
            continue
        seen.add(place)
    return total


def cache_bytes_per_step(bundle: Bundle, position: int) -> int:
    """Return the live cache bytes one stream's step reads: what is visible, and no more."""
    contract, total = bundle.manifest.contract, 0
    for layer in contract.layers:
        visible = min(position + 1, layer.window_size)
        sinks = min(layer.num_sink_tokens, max(position + 1 - layer.window_size, 0))
        total += contract.layer_bytes(layer, visible, sinks)
    return total


def _is_lookup(node: ir.Node, index: int) -> bool:
    return node.op_type in _LOOKUPS and index in (0, 2, 3)


def _experts_per_token(bundle: Bundle) -> int:
    config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    counts = [config.get(name) for name in ("num_experts_per_tok", "num_experts_per_token")]
    return prod(count for count in counts if isinstance(count, int)) or 1
