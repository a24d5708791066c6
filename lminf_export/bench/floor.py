"""The least a decoding step can take: every byte it must read, at the speed memory streams."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from lminf_export.bench.graph import Place, read_graph, stored_weights
from lminf_export.bundle.folder import Bundle
from lminf_export.errors import SessionError
from lminf_export.models.expert_facts import CHOICE_PREFIX
from lminf_export.runtime.gpu import Cuda

_BUFFER_BYTES = 2**28  # far larger than any cache of a processor
_DEVICE_BYTES = 2**30  # the same of a GPU's
_ROUNDS = 7
_NEGATION = """
<ir_version: 10, opset_import: ["" : 20]>
negation (float[n] x) => (float[n] y) { y = Neg (x) }
"""
_LOOKUPS = ("Gather", "GatherBlockQuantized")


def streaming_bandwidth(threads: int) -> float:
    """Return the bytes per second at which threads read main memory, the best of several runs.

    The maximum of 32-bit integers is numpy's fastest way to read; sums and OR are slower.
    """
    buffer = np.arange(_BUFFER_BYTES // 4, dtype=np.int32)
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def gpu_bandwidth() -> float:
    """Return the bytes per second that onnxruntime reads and writes in a GPU's memory, at best.

    Raises:
        SessionError: onnxruntime's CUDA provider cannot be started.
    """
    model = onnx.parser.parse_model(_NEGATION)
    session = ort.InferenceSession(
        model.SerializeToString(), providers=[("CUDAExecutionProvider", {})], enable_fallback=0
    )
    if "CUDAExecutionProvider" not in session.get_providers():
        raise SessionError("onnxruntime could not start its cuda provider; use --provider cpu")
    count = _DEVICE_BYTES // 4
    values = [
        ort.OrtValue.ortvalue_from_numpy(np.zeros(count, np.float32), "cuda") for _ in range(2)
    ]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", values[0])
    binding.bind_ortvalue_output("y", values[1])
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        best = min(best, time.perf_counter() - start)
    return 2 * _DEVICE_BYTES / best


def device_bandwidth(cuda: Cuda) -> float:
    """Return the bytes per second that a GPU's memory moves, the best of several copies in it.

    A copied byte is read and written, so it counts twice.

    Raises:
        SessionError: there is not even a little memory left.
    """
    nbytes = min(_DEVICE_BYTES, cuda.memory()[0] // 4)
    source, target = cuda.work_memory(nbytes), cuda.work_memory(nbytes)
    best = float("inf")
    for _ in range(_ROUNDS):
        cuda.synchronize()
        start = time.perf_counter()
        cuda.copy(target.address, source.address, source.nbytes)
        cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def weight_bytes_per_step(bundle: Bundle, batch_size: int) -> int:
    """Return the bytes of weights one decoding step reads, each once.

    Of a table that is only looked up, a row for each stream counts; of a stack of experts, or a
    table of their biases, as many rows as the step's tokens choose at most.
    """
    total = 0
    graph = read_graph(bundle)
    chosen = chosen_experts_per_token(graph) * batch_size
    seen: set[Place] = set()
    for value, tensor, place in stored_weights(bundle, graph):
        rows = int(tensor.shape.numpy()[0]) if tensor.shape.rank() else 1
        lookups = {node.inputs[1] for node, index in value.uses() if _is_lookup(node, index)}
        if not all(_is_lookup(node, index) for node, index in value.uses()):
            # The same bytes under two names are read once.
            total += 0 if place in seen else tensor.nbytes
            seen.add(place)
        elif all(index is not None and index.is_graph_input() for index in lookups):
            total += tensor.nbytes // rows * batch_size  # an embedding, by token
        else:
            total += tensor.nbytes // rows * min(chosen, rows)
            seen.add(place)
    return total


def cache_bytes_per_step(bundle: Bundle, position: int) -> int:
    """Return the cache bytes one stream's step must read: those of the visible tokens only."""
    contract, total = bundle.manifest.contract, 0
    for layer in contract.layers:
        visible = min(position + 1, layer.window_size)
        sinks = min(layer.num_sink_tokens, max(position + 1 - layer.window_size, 0))
        total += contract.layer_bytes(layer, visible, sinks)
    return total


def _is_lookup(node: ir.Node, index: int) -> bool:
    return node.op_type in _LOOKUPS and index in (0, 2, 3)


def chosen_experts_per_token(graph: ir.Graph) -> int:
    """Return how many experts each token of a graph meets in a layer; 1 without experts."""
    chosen = [node for node in graph for x in node.outputs if _holds_choice(x)]
    shapes = (node.inputs[0].shape for node in chosen if node.inputs[0] is not None)
    # (T, k): the exporter writes k into the graph, whatever the family's configuration calls it.
    counts = [shape[-1] for shape in shapes if shape is not None]
    return max((count for count in counts if isinstance(count, int)), default=1)


def _holds_choice(value: ir.Value) -> bool:
    return (value.name or "").startswith(CHOICE_PREFIX)
