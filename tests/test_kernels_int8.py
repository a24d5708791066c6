"""The CUDA kernels over rings of int8, run on a CPU by the block emulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.support.int8_rings import attended, rounded_caches
from benchmarks.support.operator_case import Case, History, shared_inputs
from lminf_export.operator.reference_int8 import quantize
from scripts.gpu import streams
from scripts.gpu.check import Stream, run_stream
from scripts.gpu.emulated_device import EmulatedDevice, counters, reset_counters
from scripts.gpu.kernel_library import KernelError, KernelLibrary, params_of
from tests.support import kernel_build

pytestmark = pytest.mark.skipif(kernel_build.compiler() is None, reason=kernel_build.NO_COMPILER)
DEVICE = EmulatedDevice(multiprocessors=16)
LARGEST_RATIO = 2.0
TYPES = (torch.float32, *streams.HALF_TYPES)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return kernel_build.shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def library(folder):
    library = KernelLibrary(kernel_build.emulated_library(folder))
    DEVICE.configure(library)
    return library


def by_name(*groups):
    found = [replace(stream, int8_rings=True) for group in groups for stream in group]
    return [pytest.param(stream, id=stream.name) for stream in found]


def assert_right(outcome):
    assert not outcome.problems
    assert outcome.error <= LARGEST_RATIO * outcome.torch_error


@pytest.mark.parametrize(
    "stream",
    by_name(
        streams.feature_streams(torch.float16),
        streams.feature_streams(torch.bfloat16)[::2],
        streams.feature_streams(torch.float32)[1::3],
    ),
)
def test_every_feature_follows_the_specification(library, stream):
    assert_right(run_stream(library, DEVICE, stream))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "stream",
    by_name(
        streams.shape_streams(torch.float16),
        streams.some_shape_streams(torch.bfloat16, 3),
        streams.some_shape_streams(torch.float32, 7),
    ),
)
def test_every_head_dimension_and_ratio_of_heads_follows_the_specification(library, stream):
    assert_right(run_stream(library, DEVICE, stream))


@pytest.mark.parametrize("stream", by_name(*map(streams.lap_streams, TYPES)))
def test_a_ring_that_goes_round_several_times_follows_the_specification(library, stream):
    assert_right(run_stream(library, DEVICE, stream))


@pytest.mark.slow
@pytest.mark.parametrize("stream", by_name(*map(streams.long_streams, streams.HALF_TYPES)))
def test_split_keys_and_several_tiles_follow_the_specification(library, stream):
    assert_right(run_stream(library, DEVICE, stream))


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("dtype", streams.HALF_TYPES)
def test_values_of_any_size_keep_their_precision(library, dtype, size, chunk):
    """Weights meet the scales of values before they are rounded to 16 bits."""
    case = streams.SMALL.with_(window_size=211, num_sink_tokens=0)
    inputs, outputs, attributes = one_step(case, (10**6, 5000), (chunk, chunk), dtype, size)
    library.launch(params_of(inputs, outputs, attributes), None)
    right = attended(case, inputs, [*outputs[1:3], *inputs[5:7]], outputs[5:])
    error = (outputs[0].double() - right).abs().max() / right.abs().max()
    assert error < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (32, 2)])
def test_decode_loads_one_byte_of_each_key_in_the_window(library, heads, kv_heads, head_dim):
    case = streams.SMALL.with_(
        window_size=160, num_sink_tokens=16, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, rotary_dim=head_dim,
    )  # fmt: skip
    inputs, outputs, attributes = one_step(case, (10**6, 10**6), (1, 1), torch.float16)
    reset_counters(library)
    library.launch(params_of(inputs, outputs, attributes), None)
    window, sinks = 160, 16 * 2
    assert counters(library).streamed_bytes == 2 * kv_heads * (window + sinks) * case.head_dim * 2


def test_a_chunk_copies_a_byte_of_each_element_and_the_scales(library):
    case = streams.SMALL.with_(
        window_size=64, num_sink_tokens=0, chunk_size=256, num_heads=1, num_kv_heads=1
    )
    inputs, outputs, attributes = one_step(case, (10**6,), (256,), torch.float16)
    reset_counters(library)
    library.launch(params_of(inputs, outputs, attributes), None)
    assert counters(library).copied_bytes == 2 * 3 * 64 * (case.head_dim + 4) * 2


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_order_in_which_warps_run_changes_no_bit(library, chunk):
    case = streams.SMALL.with_(window_size=211, num_heads=6, num_kv_heads=2)
    results = []
    for reverse in (False, True):
        DEVICE.configure(library, reverse=reverse)
        inputs, outputs, attributes = one_step(case, (300, 10**7), (chunk, chunk), torch.float16)
        library.launch(params_of(inputs, outputs, attributes), None)
        results.append(outputs[0])
    DEVICE.configure(library)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_of_zeros_has_scale_zero_and_ties_go_to_even(library, dtype):
    case = streams.SMALL.with_(rotary_dim=0, num_heads=1, num_kv_heads=1)
    inputs, outputs, attributes = one_step(case, (40,), (2,), dtype)
    inputs[1][0, 0, 0] = inputs[2][0, 0, 0] = 0.0
    ties = torch.arange(-63, 64, 2)[:63].repeat(2)[: case.head_dim].to(dtype) / 2
    ties[0] = 127.0
    inputs[1][0, 0, 1] = inputs[2][0, 0, 1] = ties
    library.launch(params_of(inputs, outputs, attributes), None)
    for ring, scale in ((1, 5), (2, 6)):
        slots = [position % case.capacity for position in (40, 41)]
        assert outputs[scale][0, 0, slots, 0].tolist() == [0.0, 1.0]
        assert not outputs[ring][0, 0, slots[0]].any()
        assert torch.equal(outputs[ring][0, 0, slots[1]], quantize(ties.float())[0])
    assert outputs[0].isfinite().all()


def test_rings_without_the_bias_of_keys_are_refused_by_name(library):
    inputs, outputs, attributes = one_step(streams.SMALL, (40,), (1,), torch.float16)
    params = params_of(inputs, outputs, attributes)
    params.has_key_bias = True
    with pytest.raises(KernelError, match="LambdaAttentionInt8CacheKeyBias: rings without"):
        library.launch(params, None)


@pytest.mark.parametrize("name", ["past_key_scale", "present_value_scale"])
def test_scales_that_are_missing_are_refused(library, name):
    inputs, outputs, attributes = one_step(streams.SMALL, (40,), (1,), torch.float16)
    params = params_of(inputs, outputs, attributes)
    setattr(params, name, None)
    with pytest.raises(KernelError, match=f"LambdaAttentionInt8Cache: {name} is a null pointer"):
        library.launch(params, None)


def one_step(case: Case, bases, new_lengths, dtype, value_size=1.0):
    """Inputs, outputs and attributes of one step in place."""
    width = max(1, *new_lengths)
    history = History(case, list(bases), width, dtype)
    history.value *= value_size
    past, new = torch.tensor(bases), torch.tensor(new_lengths)
    caches, scales = rounded_caches(history, case.capacity)
    shared = shared_inputs(case, past, new, width, case.capacity)
    state = (*history.chunk(past, new, width), *caches, *shared, *scales)
    inputs = [x.contiguous() for x in state]
    output = torch.full_like(inputs[0], float("nan"))
    return inputs, [output, *inputs[3:7], *inputs[17:]], case.attributes()


# What must not go unnoticed: each line of a kernel replaced by a wrong one.
MUTATIONS = {
    "tiles_missing_wait": ("tiles_rounded.cuh", "waitCopies<1>();", "waitCopies<2>();"),
    "tiles_missing_barrier": (
        "tiles_rounded.cuh",
        "      expandTile(stage);\n      syncBlock();",
        "      expandTile(stage);",
    ),
    "tiles_scales_of_keys_for_values": (
        "tiles_rounded.cuh",
        "applyScales(weights, scales + kKeys)",
        "applyScales(weights, scales)",
    ),
    "bytes_without_their_sign": ("ring.cuh", "0x64806480u", "0x64006400u"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(library, folder, tmp_path, mutation):
    mutant = kernel_build.broken_library(
        folder, "tiles_float16_int8.cu", *MUTATIONS[mutation], tmp_path
    )
    case = streams.SMALL.with_(window_size=211, chunk_size=149, num_heads=2)
    stream = Stream(mutation, case, (10**6,), ((149,), (149,)), int8_rings=True)
    outcome = run_stream(KernelLibrary(mutant), replace(DEVICE), stream)
    assert outcome.problems or outcome.error > LARGEST_RATIO * outcome.torch_error
