"""Continues a text, given as token ids, with a bundle's graph: numpy and onnxruntime, no more.

    python generate.py BUNDLE/model.onnx NUM_TOKENS TOKEN_ID [TOKEN_ID ...]

Prints one line for each new token: its id and its logit. LMINF_KERNELS=PATH in the environment
loads the library of kernels that lminf-export installs; without it onnxruntime runs the bodies
that the graph carries. docs/without_python.md explains every step.
"""

import json
import os
import sys

import numpy as np
import onnxruntime as ort

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
FIRST_SLOTS = 64


class Stream:
    """One text: its caches, and how many tokens it has."""

    def __init__(self, path, kernels=None):
        options = ort.SessionOptions()
        if kernels:
            options.register_custom_ops_library(kernels)
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        properties = self.session.get_modelmeta().custom_metadata_map
        self.chunk_size = int(properties["lminf.chunk_size"])
        self.capacities = [row["ring_capacity"] for row in json.loads(properties["lminf.layers"])]
        self.vocab_size = self.session.get_outputs()[0].shape[2]
        self.length = 0  # tokens read; it grows without end
        self.slots = 0  # of every ring, while that is less than its capacity
        self.caches = {}
        self.reserve(1)

    def reserve(self, needed):
        """Let every ring hold so many positions, or its full capacity, after which it wraps."""
        if self.slots and (needed <= self.slots or self.slots >= max(self.capacities)):
            return
        self.slots = max(FIRST_SLOTS, 2 * self.slots, needed)
        for value in self.session.get_inputs():
            if not value.name.startswith("past_key_values."):
                continue
            layer = int(value.name.split(".")[1])
            ring = min(self.slots, self.capacities[layer])
            shape = [1 if i == 0 else ring if isinstance(n, str) else n
                     for i, n in enumerate(value.shape)]  # fmt: skip
            array = np.zeros(shape, TYPES[value.type])
            old = self.caches.get(value.name)
            if old is not None:  # a ring that has not wrapped has position p in slot p
                array[:, :, : old.shape[2]] = old
            self.caches[value.name] = array

    def step(self, token_ids):
        """Read 1 … chunk_size tokens and return the logits (V,) of the last."""
        count = len(token_ids)
        self.reserve(self.length + count)
        inputs = {
            "input_ids": np.array([token_ids], np.int64),
            "past_length": np.array([self.length], np.int64),
            "new_length": np.array([count], np.int64),
            "logits_index": np.array([[count - 1]], np.int64),
        }
        logits = np.empty((1, 1, self.vocab_size), np.float32)
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        for name, array in self.caches.items():
            # Past and present are one buffer: the step writes its few slots and copies nothing.
            value = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), value)
        self.session.run_with_iobinding(binding)
        self.length += count
        return logits[0, 0]

    def read(self, token_ids):
        """Read a text of any length, chunk by chunk; return the logits of its last token."""
        logits = None
        for start in range(0, len(token_ids), self.chunk_size):
            logits = self.step(token_ids[start : start + self.chunk_size])
        return logits


def main():
    """Read the arguments, write the tokens."""
    path, count, *prompt = sys.argv[1:]
    stream = Stream(path, os.environ.get("LMINF_KERNELS"))
    logits = stream.read([int(token) for token in prompt])
    for _ in range(int(count)):
        token = int(logits.argmax())
        print(token, f"{logits[token]:.9g}")
        logits = stream.step([token])


if __name__ == "__main__":
    main()
