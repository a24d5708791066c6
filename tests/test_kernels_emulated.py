"""The unmodified CUDA kernels, run on a CPU by the block emulation, against the mathematics."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from scripts.gpu import streams
from scripts.gpu.check import Guarded, Stream, run_stream
from scripts.gpu.emulated_device import EmulatedDevice, counters, reset_counters
from scripts.gpu.kernel_library import KernelLibrary, params_of
from tests.support import broken_kernel, kernel_build
from tests.support.kernel_case import assert_a_chunk_copies_what_its_rows_see, one_step

pytestmark = pytest.mark.skipif(kernel_build.compiler() is None, reason=kernel_build.NO_COMPILER)
DEVICE = EmulatedDevice()
HOPPER = broken_kernel.HOPPER
WIDE = EmulatedDevice(multiprocessors=16)  # more than a few rows have blocks for
# The bound; the emulation reaches 1.0 because it rounds where torch rounds.
LARGEST_RATIO = 2.0


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return kernel_build.shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def library(folder):
    library = KernelLibrary(kernel_build.emulated_library(folder))
    DEVICE.configure(library)
    return library


def assert_right(outcome):
    assert not outcome.problems
    assert outcome.error <= LARGEST_RATIO * outcome.torch_error


def by_name(groups):
    return [pytest.param(stream, id=stream.name) for group in groups for stream in group]


@pytest.mark.parametrize(
    "stream", by_name(streams.feature_streams(t) for t in (torch.float32, *streams.HALF_TYPES))
)
def test_every_feature_matches_float64_at_near_and_far_positions(library, stream):
    assert_right(run_stream(library, DEVICE, stream))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "stream",
    by_name(
        [
            streams.shape_streams(torch.float16),
            streams.some_shape_streams(torch.bfloat16, 3),
            streams.some_shape_streams(torch.float32, 7),
        ]
    ),
)
def test_every_head_dimension_and_ratio_of_heads_matches_float64(library, stream):
    assert_right(run_stream(library, DEVICE, stream))


@pytest.mark.parametrize(
    "stream", by_name(streams.lap_streams(t) for t in (torch.float32, *streams.HALF_TYPES))
)
def test_a_ring_that_goes_round_several_times_matches_float64(library, stream):
    assert_right(run_stream(library, DEVICE, stream))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stream", by_name([streams.long_streams(torch.float16), streams.long_streams(torch.bfloat16)])
)
def test_split_keys_and_several_tiles_match_float64(library, stream):
    decodes = stream.name.startswith("long_decode")
    device = WIDE if decodes else DEVICE
    device.configure(library)
    outcome = run_stream(library, device, stream)
    DEVICE.configure(library)
    assert_right(outcome)
    assert (outcome.splits > 1) == (decodes and stream.with_workspace)


@pytest.fixture(scope="session")
def hopper(folder):
    """A library that takes the kernel on warpgroups wherever it can."""
    return KernelLibrary(kernel_build.emulated_library(folder), "hopper")


@pytest.mark.sampled
@pytest.mark.parametrize(
    "stream",
    by_name(
        [x for x in make(dtype) if x.case.head_dim in streams.HOPPER_HEAD_DIMS]
        for dtype in streams.HALF_TYPES
        for make in (streams.feature_streams, streams.lap_streams, streams.tile_streams)
    ),
)
def test_the_hopper_kernel_matches_float64(hopper, stream):
    HOPPER.configure(hopper)
    outcome = run_stream(hopper, HOPPER, stream)
    DEVICE.configure(hopper)
    assert_right(outcome)
    assert outcome.kernels == {"tiles_hopper"}
    assert (outcome.splits > 1) == stream.name.startswith("tiles_split")


def test_the_streams_run_every_kernel(library):
    cases = [*streams.shape_streams(torch.float16), streams.feature_streams(torch.float32)[0]]
    kernels = set()
    for stream in cases:
        for chunk in {max(1, *chunk) for chunk in stream.chunks}:
            params = params_of(*one_step(stream.case, (5, 9), (chunk, 1), stream.dtype))
            kernels.add(library.plan(params, 4, DEVICE.shared_bytes, 0).kernel)
    assert kernels == {"simple", "decode8", "decode16", "tiles64", "tiles128"}


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


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (32, 2)])
def test_decode_loads_each_key_in_the_window_once_for_all_its_heads(
    library, heads, kv_heads, head_dim
):
    case = streams.SMALL.with_(
        window_size=160, num_sink_tokens=16, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, rotary_dim=head_dim,
    )  # fmt: skip
    inputs, outputs, attributes = one_step(case, (10**6, 10**6), (1, 1), torch.float16)
    reset_counters(library)
    library.launch(params_of(inputs, outputs, attributes), None)
    keys = 160 + 16
    assert counters(library).streamed_bytes == 2 * kv_heads * keys * case.head_dim * 2 * 2


def test_a_chunk_copies_no_tile_outside_what_its_rows_see(library):
    assert_a_chunk_copies_what_its_rows_see(library)


def test_a_small_ring_that_grows_gives_what_the_full_one_gives(library):
    case = streams.SMALL.with_(window_size=61)
    inputs, outputs, attributes = one_step(case, (17,), (5,), torch.float16)
    library.launch(params_of(inputs, outputs, attributes), None)
    small = [x[:, :, :23].contiguous() for x in inputs[3:5]]
    slots = inputs[10][:, :23].contiguous()
    few = [*inputs[:3], *small, *inputs[5:10], slots, *inputs[11:]]
    again = [torch.full_like(outputs[0], float("nan")), *small, *inputs[5:7]]
    library.launch(params_of(few, again, attributes, growing=True), None)
    assert torch.equal(again[0], outputs[0])


def test_an_empty_batch_row_gives_zeros_even_at_the_start(library):
    for dtype in (torch.float32, *streams.HALF_TYPES):
        inputs, outputs, attributes = one_step(streams.SMALL, (0, 10**6), (0, 0), dtype)
        library.launch(params_of(inputs, outputs, attributes), None)
        assert not outputs[0].any()


# What must not go unnoticed: each line of a kernel replaced by a wrong one.
MUTATIONS = {
    "missing_wait_for_copies": ("tiles.cuh", "waitCopies<1>();", "waitCopies<2>();"),
    "missing_barrier": (
        "tiles.cuh",
        "    waitCopies<1>();\n    syncBlock();",
        "    waitCopies<1>();",
    ),
    "window_one_too_long": ("arithmetic.h", "step - windowLimit + 1 -", "step - windowLimit -"),
    "key_of_the_wrong_lane": (
        "tiles_warp.cuh",
        "half = lane / 8 % 2 * 8;",
        "half = lane / 16 * 8;",
    ),
}

# The same for the kernel on warpgroups, whose emulation also says itself what is wrong.
_KEYS, _VALUES = (
    "release(shared.keysEmpty(keys.place));",
    "release(shared.valuesEmpty(values.place));",
)
_SUMS = "waitProducts<0>(sum, weights);"
HOPPER_MUTATIONS = {
    "keys_not_awaited": (
        "tiles_hopper.cuh",
        "waitAt(shared.keysFull(stage.place), stage.parity);",
        "",
    ),
    "values_not_awaited": (
        "tiles_hopper.cuh",
        "waitAt(shared.valuesFull(stage.place), stage.parity);",
        "",
    ),
    "queries_not_awaited": ("tiles_hopper.inl", "      warpgroup.meet();\n", ""),
    "stage_of_keys_not_awaited": (
        "hopper_shared.cuh",
        "waitAt(shared.keysEmpty(keys.place), keys.parity ^ 1u);",
        "",
    ),
    "stage_of_values_not_awaited": (
        "hopper_shared.cuh",
        "waitAt(shared.valuesEmpty(values.place), values.parity ^ 1u);",
        "",
    ),
    "keys_released_too_early": (
        "tiles_hopper.cuh",
        f"waitProducts<1>(products);\n      {_KEYS}",
        f"{_KEYS}\n      waitProducts<1>(products);",
    ),
    "values_released_too_early": (
        "tiles_hopper.cuh",
        f"{_SUMS}\n      {_VALUES}",
        f"{_VALUES}\n      {_SUMS}",
    ),
    "products_not_awaited": ("tiles_hopper.cuh", "waitProducts<1>(products);", ""),
    "weights_overwritten": (
        "tiles_hopper.cuh",
        f"      {_SUMS}\n      release",
        f"      packWeights();\n      {_SUMS}\n      release",
    ),
    "shared_memory_not_fenced": ("tiles_hopper.cuh", "    fenceShared();\n", ""),
    "registers_not_fenced": ("tiles_hopper.cuh", "    fenceProducts();\n", ""),
    "too_few_arrivals": (
        "hopper_shared.cuh",
        "initBarrier(keysFull(place), kWarpgroup);",
        "initBarrier(keysFull(place), kWarpgroup - 1);",
    ),
    "wrong_pattern": ("hopper_matrix.h", "(chunk % 8 ^ row % 8)", "(chunk % 8 ^ row % 4)"),
    "wrong_step": ("hopper_matrix.h", "step % 4 * 32", "step % 4 * 16"),
    "ring_seen_as_sinks": ("tiles_hopper.cuh", "if (tile == sinkTiles)", "if (tile < 0)"),
    "turn_not_given": (
        "tiles_hopper.inl",
        "if (begin + 1 < end) warpgroup",
        "if (false) warpgroup",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", HOPPER_MUTATIONS)
def test_a_broken_hopper_kernel_is_found(library, folder, tmp_path, mutation):
    change = HOPPER_MUTATIONS[mutation]
    mutant = kernel_build.broken_library(folder, "tiles_hopper_float16.cu", *change, tmp_path)
    command = [sys.executable, "-m", "tests.support.broken_kernel", str(mutant), "hopper"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    said = "emulated kernel" in done.stderr
    assert done.returncode == broken_kernel.FOUND or (done.returncode == -signal.SIGABRT and said)


def test_the_hopper_kernel_that_is_broken_above_is_right(library):
    found = broken_kernel.main(str(library.path))
    DEVICE.configure(library)
    assert not found


def test_the_order_in_which_warpgroups_run_and_copies_arrive_changes_no_bit(hopper):
    case = streams.SMALL.with_(window_size=401, num_heads=2, num_kv_heads=1, chunk_size=67)
    results = []
    for reverse, eager in ((False, False), (True, False), (False, True), (True, True)):
        HOPPER.configure(hopper, reverse=reverse, eager=eager)
        inputs, outputs, attributes = one_step(case, (10**7,), (67,), torch.float16)
        hopper.launch(params_of(inputs, outputs, attributes), None)
        results.append(outputs[0])
    DEVICE.configure(hopper)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(library, folder, tmp_path, mutation):
    mutant = kernel_build.broken_library(folder, "tiles_float16.cu", *MUTATIONS[mutation], tmp_path)
    case = streams.SMALL.with_(window_size=211, chunk_size=149, num_heads=2)
    stream = Stream(mutation, case, (10**6,), ((149,), (149,)))
    outcome = run_stream(KernelLibrary(mutant), replace(DEVICE), stream)
    assert outcome.problems or outcome.error > LARGEST_RATIO * outcome.torch_error


def test_guard_bytes_notice_a_write_behind_a_tensor():
    guarded = Guarded(torch.zeros(3, 5), "cpu")
    assert guarded.intact()
    guarded.memory[-256] = 0
    assert not guarded.intact()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake: its build is not tried")
def test_cmake_builds_the_emulated_library(tmp_path):
    command = kernel_build.cmake(tmp_path, "-DLMINF_EMULATE=ON")
    subprocess.run(command, check=True, capture_output=True)
    built = subprocess.run(
        ["cmake", "--build", str(tmp_path), "--target", "lambda_attention_params"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
