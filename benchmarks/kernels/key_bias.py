"""Attention over int8 rings in the CPU kernel, with and without a bias of keys that is kept out.

One node of each kind over several rings in turn, as layers have them, taking turns on one thread.

    python -m benchmarks.kernels.key_bias --out benchmarks/results/key_bias.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto

from benchmarks.support.operator_case import Case, shared_inputs
from benchmarks.support.operator_node import one_node_model
from benchmarks.support.result import write_result
from lminf_export.operator import contract
from lminf_export.operator.attention_body import BodyFeatures, function_body
from lminf_export.runtime.environment import environment
from lminf_export.runtime.kernels import INSTALLED

# Query heads, key/value heads, head dimension, tokens of a step.
SHAPES = ((28, 4, 128, 1), (14, 2, 64, 1), (8, 8, 64, 1), (14, 2, 64, 256))
WINDOW, CHUNK, SINKS, POSITION, RINGS = 2048, 256, 16, 5000, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kernels", type=Path, default=INSTALLED)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [measured(shape, arguments) for shape in SHAPES]
    write_result(arguments.out, {"benchmark": "key_bias", "rows": rows, **environment()})


def measured(shape: tuple[int, int, int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    num_heads, num_kv_heads, head_dim, tokens = shape
    case = Case(
        window_size=WINDOW,
        chunk_size=CHUNK,
        num_sink_tokens=SINKS,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        key_bias=300.0,
        theta=1e6,
    )
    rings = RINGS if tokens == 1 else 2
    nodes = {
        name: Node(case, tokens, rings, arguments.kernels, key_bias=name == "bias")
        for name in ("none", "bias")
    }
    times: dict[str, list[float]] = {name: [] for name in nodes}
    for _ in range(arguments.rounds):
        for name, node in nodes.items():
            times[name].append(node.run())
    ratios = [a / b for a, b in zip(times["bias"], times["none"], strict=True)]
    row = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "window_size": WINDOW,
        "tokens": tokens,
        "rounds": arguments.rounds,
        "ms": {name: round(statistics.median(found), 4) for name, found in times.items()},
        "least_ms": {name: round(min(found), 4) for name, found in times.items()},
        "ratio": round(statistics.median(ratios), 3),
    }
    print(row, file=sys.stderr)
    return row


class Node:
    """One node of the operator over several rings of random numbers, updated in place."""

    def __init__(
        self, case: Case, tokens: int, rings: int, kernels: Path, *, key_bias: bool
    ) -> None:
        function = function_body(BodyFeatures(int8_cache=True, key_bias=key_bias))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(kernels))
        model = one_node_model(case, function, TensorProto.FLOAT).SerializeToString()
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.bindings = []
        generator = np.random.default_rng(0)
        names = contract.input_names(int8_cache=True, key_bias=key_bias)
        for _ in range(rings):
            arrays = inputs_of(case, tokens, generator)
            values = {name: ort.OrtValue.ortvalue_from_numpy(arrays[name]) for name in names}
            binding = self.session.io_binding()
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name in contract.output_names(int8_cache=True):
                past = values.get(name.replace("present", "past"))
                if past is None:
                    binding.bind_output(name)
                else:
                    binding.bind_ortvalue_output(name, past)
            self.bindings.append((binding, values))

    def run(self) -> float:
        """Milliseconds of one call, the mean over the rings."""
        start = time.perf_counter()
        for binding, _ in self.bindings:
            self.session.run_with_iobinding(binding)
        return (time.perf_counter() - start) * 1e3 / len(self.bindings)


def inputs_of(case: Case, tokens: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    past, new = torch.tensor([POSITION]), torch.tensor([tokens])
    shared = shared_inputs(case, past, new, tokens, case.capacity)
    behind = [case.bias, case.tables().cos, case.tables().sin]
    sizes = {
        "B": 1,
        "H": case.num_heads,
        "G": case.num_kv_heads,
        "S": tokens,
        "C": case.capacity,
        "N": SINKS,
        "D": case.head_dim,
        "1": 1,
    }
    operands = contract.inputs(key_bias=True)
    first = len(contract.INPUTS) - len(shared)
    known = dict(zip((x.name for x in operands[first : len(contract.INPUTS)]), shared, strict=True))
    known |= dict(zip((x.name for x in contract.KEY_BIAS_INPUTS), behind, strict=True))
    found = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in known.items()}
    for operand in operands:
        if operand.name in found:
            continue
        shape = tuple(sizes[letter] for letter in operand.shape)
        if operand.element == "ring":
            found[operand.name] = generator.integers(-127, 128, shape).astype(np.int8)
        else:
            values = generator.random(shape, np.float32)
            found[operand.name] = values * np.float32(
                0.02 if operand in contract.SCALE_INPUTS else 1
            )
    return found


if __name__ == "__main__":
    main()
