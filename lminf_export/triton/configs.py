"""The files config.pbtxt of a repository's models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lminf_export.bundle.manifest import Manifest
from lminf_export.operator.bindings import BATCH, INPUT_IDS, LOGITS, TensorSpec
from lminf_export.tensors.dtypes import ELEMENT_TYPES
from lminf_export.triton.implicit_state import PRESENT_LENGTH, READY, START, STATE_LENGTH
from lminf_export.triton.interface import INPUTS, OUTPUTS, ModelTensor

# A sequence that is idle for so long loses its state.
_IDLE_MICROSECONDS = 600_000_000


def python_config(name: str, parameters: Mapping[str, str], why_here: str = "") -> str:
    """Return the configuration of a model of the python backend.

    Args:
        name: of the model.
        parameters: that `TritonPythonModel` reads.
        why_here: why a plan is run here and not by Triton's TensorRT backend; "" for a graph.
    """
    note = (
        f"""
# The bundle's plan, on a GPU: {why_here}.
# NOT RUN: no machine with a GPU and Triton has seen this."""
        if why_here
        else ""
    )
    given = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{_escaped(value)}" }} }}'
        for key, value in parameters.items()
    )
    return f"""# lminf: a bundle with a bounded cache, over its own engine of slots.{note}
name: "{name}"
backend: "python"
# Requests are batched by the engine, between two of its steps, and not by Triton.
max_batch_size: 0
# Text is sent as it is written. A client streams by gRPC, or by HTTP's generate_stream.
model_transaction_policy {{ decoupled: true }}
# One process with one engine. More instances would be more copies of the weights, and a sequence
# would find its session in the one that began it only.
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
# One of text_input, input_ids and messages is needed.
input [
{_joined(_commented(tensor, "optional: true") for tensor in INPUTS)}
]
output [
{_joined(map(_commented, OUTPUTS))}
]
# Settings of `lminf serve` by their names, and provider, kernels, threads, template, trust_hash,
# session_secret_file. A path that is not absolute is one in the version's folder.
{given}
"""


def implicit_config(name: str, manifest: Manifest, slots: int, library: str | None) -> str:
    """Return the configuration of the bare graph with implicit state, for onnxruntime's backend.

    Args:
        name: of the model.
        manifest: of the bundle.
        slots: sequences side by side.
        library: path of the kernels, as the server sees it; None for the graph's own function.
    """
    contract = manifest.contract
    sizes = {**contract.ring_sizes(), BATCH: 1}
    pairs = zip(contract.caches(present=False), contract.caches(present=True), strict=True)
    states = [_state(STATE_LENGTH, PRESENT_LENGTH, "int64", (1,))]
    for past, present in pairs:
        _, *dims = past.sized(sizes)
        states.append(_state(past.name, present.name, past.dtype, dims))
    kernels = ""
    if library is not None:
        kernels = f"""
# The kernels of attention; without them the graph's own function body runs. The path is the
# server's: change it where the repository is mounted elsewhere.
model_operations {{ op_library_filename: "{_escaped(library)}" }}
"""
    return f"""# lminf: the bare graph, whose state Triton carries from request to request.
# Logits in, logits out: choosing tokens is the client's. See README.md for what it costs.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {slots}
# 1 to {manifest.lambda_config.chunk_size} new tokens of the sequence.
input [ {{ name: "{INPUT_IDS}" data_type: TYPE_INT64 dims: [ -1 ] }} ]
# Of the last new token.
output [ {{ name: "{LOGITS}" data_type: TYPE_FP32 dims: [ 1, {manifest.vocab_size} ] }} ]
{kernels}
sequence_batching {{
  max_sequence_idle_microseconds: {_IDLE_MICROSECONDS}
  # A sequence has its row of the batch until it ends.
  direct {{ max_queue_delay_microseconds: 0 }}
  control_input [
    {{ name: "{START}"
      control [ {{ kind: CONTROL_SEQUENCE_START bool_false_true: [ false, true ] }} ] }},
    {{ name: "{READY}"
      control [ {{ kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] }} ] }}
  ]
  # The lengths begin at zero where START is set; the caches need no beginning of their own, but
  # Triton must be told of one.
  state [
{_joined(states)}
  ]
}}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


def tensorrt_config(name: str, manifest: Manifest, slots: int, library: str | None) -> str:
    """Return the configuration of a plan, for TensorRT's backend.

    It was not run: no machine with a GPU and Triton's TensorRT backend has seen it.

    Args:
        name: of the model.
        manifest: of the bundle, which has a plan.
        slots: sequences side by side, at most those that the plan takes.
        library: the plugin's path, as the server sees it; None where the plan carries it.
    """
    contract = manifest.contract
    sizes = {**contract.ring_sizes(), BATCH: 1}
    inputs = [_bound(spec, sizes) for spec in contract.inputs()]
    outputs = [_bound(spec, sizes) for spec in contract.outputs()]
    plugin = ""
    if library is not None:
        plugin = (
            "# Start tritonserver with this library loaded, as a plan's plugin has to be:\n"
            f"#   LD_PRELOAD={library} tritonserver ...\n"
            "#   or --backend-config=tensorrt,plugins=" + library + "\n"
        )
    return f"""# lminf: the plan, whose caches are inputs and outputs of each request.
# NOT RUN: written by the contract of the plan; no machine with a GPU has seen it.
{plugin}name: "{name}"
backend: "tensorrt"
max_batch_size: {slots}
input [
{_joined(inputs)}
]
output [
{_joined(outputs)}
]
instance_group [ {{ kind: KIND_GPU count: 1 }} ]
"""


def _commented(tensor: ModelTensor, *more: str) -> str:
    """Return a tensor of the python backend's model, with further lines."""
    lines = (
        f"# {tensor.meaning}",
        f'name: "{tensor.name}"',
        f"data_type: {tensor.dtype}",
        f"dims: [ {', '.join(map(str, tensor.dims))} ]",
        *more,
    )
    return "  {\n" + "".join(f"    {line}\n" for line in lines) + "  }"


def _state(past: str, present: str, dtype: str, dims: Iterable[int]) -> str:
    kind = f"TYPE_{ELEMENT_TYPES[dtype].triton}"
    shape = ", ".join(map(str, dims))
    return f"""    {{
      input_name: "{past}"
      output_name: "{present}"
      data_type: {kind}
      dims: [ {shape} ]
      initial_state {{ name: "zeros" data_type: {kind} dims: [ {shape} ] zero_data: true }}
    }}"""


def _bound(spec: TensorSpec, sizes: Mapping[str, int]) -> str:
    """Return an input or output; Triton counts the dimension of the batch by itself."""
    _, *rest = spec.shape
    dims = ", ".join(str(x if isinstance(x, int) else sizes.get(x, -1)) for x in rest)
    # Triton takes no tensor without dimensions: clients send (B, 1), the plan gets (B,).
    shape = f"dims: [ {dims} ]" if rest else "dims: [ 1 ] reshape: { shape: [ ] }"
    kind = f"TYPE_{ELEMENT_TYPES[spec.dtype].triton}"
    return f'  {{ name: "{spec.name}" data_type: {kind} {shape} }}'


def _joined(parts: Iterable[str]) -> str:
    return ",\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
