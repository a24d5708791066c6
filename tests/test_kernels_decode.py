"""Decoding on the block emulation: who appends, how keys are split, in which order blocks run."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from scripts.gpu import streams
from scripts.gpu.check import Stream, run_stream
from scripts.gpu.emulated_device import EmulatedDevice, counters, reset_counters
from scripts.gpu.kernel_library import (
    CHOSEN_BY_PLAN,
    Choices,
    KernelError,
    KernelLibrary,
    params_of,
)
from scripts.gpu.kernel_steps import combine_in_last_block
from tests.support import broken_kernel, kernel_build
from tests.support.kernel_case import one_step

pytestmark = pytest.mark.skipif(kernel_build.compiler() is None, reason=kernel_build.NO_COMPILER)
DEVICE = EmulatedDevice()
LARGEST_RATIO = 2.0
LONG = streams.SMALL.with_(window_size=211, num_heads=6, num_kv_heads=2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return kernel_build.shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def library(folder):
    library = KernelLibrary(kernel_build.emulated_library(folder))
    DEVICE.configure(library)
    return library


def step(library, case, bases, new, dtype=torch.float16, choices=CHOSEN_BY_PLAN):
    """Run one step in place; returns its outputs."""
    inputs, outputs, attributes = one_step(case, bases, new, dtype)
    params = params_of(inputs, outputs, attributes)
    workspace = torch.full((library.workspace_size(params) // 4,), float("nan"))
    library.launch(params, workspace, choices=choices)
    return outputs


@pytest.mark.parametrize(
    ("window", "chunk", "choices", "launches"),
    [
        (37, 1, CHOSEN_BY_PLAN, 1),
        (1511, 1, CHOSEN_BY_PLAN, 2),
        (37, 1, Choices(appends_in_decode=False), 2),
        (1511, 1, Choices(appends_in_decode=False), 3),
        (37, 2, CHOSEN_BY_PLAN, 2),
        (1511, 2, CHOSEN_BY_PLAN, 3),
    ],
)
def test_a_single_token_takes_one_launch_or_two(library, window, chunk, choices, launches):
    reset_counters(library)
    step(library, streams.SMALL.with_(window_size=window), (10**6,), (chunk,), choices=choices)
    assert counters(library).launches == launches


def test_sinks_that_are_copied_are_copied_by_the_append_kernel(library):
    inputs, outputs, attributes = one_step(streams.SMALL, (3, 10**6), (1, 1), torch.float16)
    wanted = [x.clone() for x in step(library, streams.SMALL, (3, 10**6), (1, 1))]
    apart = [outputs[0], *(torch.full_like(x, float("nan")) for x in outputs[1:])]
    reset_counters(library)
    library.launch(params_of(inputs, apart, attributes), None)
    assert counters(library).launches == 2
    assert all(map(torch.equal, apart, wanted))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", streams.HALF_TYPES)
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 13, 64])
def test_who_appends_changes_no_bit(library, splits, dtype, reverse):
    """Near the start, at a tile's edge and far away, and in rows of padding."""
    bases = (0, 1, 15, 16, 208, 10**7, 10**12 + 3, 47)
    new = (1, 1, 1, 1, 1, 1, 1, 0)
    DEVICE.configure(library, reverse=reverse)
    results = [
        step(library, LONG, bases, new, dtype, Choices(splits=splits, appends_in_decode=appends))
        for appends in (True, False)
    ]
    DEVICE.configure(library)
    assert all(map(torch.equal, *results))
    assert torch.isfinite(results[0][0]).all()


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 61])
@pytest.mark.parametrize("grows", [False, True])
def test_who_appends_changes_no_bit_in_the_smallest_ring(library, window, grows):
    """The ring is as long as the window; or half as long, and the last free slot is taken."""
    capacity = max(1, window // 2) if grows else window
    bases = (0, capacity - 1) if grows else (0, window - 1, window, window + 1, 10**12 + 3)
    case = LONG.with_(window_size=window)
    results = []
    for appends in (True, False):
        inputs, outputs, attributes = one_step(
            case, bases, (1,) * len(bases), torch.float16, capacity
        )
        params = params_of(inputs, outputs, attributes, growing=grows)
        workspace = torch.full((2**20,), float("nan"))
        library.launch(params, workspace, choices=Choices(splits=3, appends_in_decode=appends))
        results.append(outputs)
    assert all(map(torch.equal, *results))
    assert torch.isfinite(results[0][0]).all()


HOPPER = EmulatedDevice(hopper=True)


@pytest.mark.parametrize(
    ("device", "choices", "early"),
    [
        (HOPPER, broken_kernel.EARLY, 2),
        (HOPPER, Choices(splits=3), 1),
        (HOPPER, Choices(splits=1), 0),
        (HOPPER, Choices(splits=3, starts_early=False), 0),
        (DEVICE, broken_kernel.EARLY, 0),
        # PTX of 8.0, which has no instruction to wait, translated for a newer device.
        (replace(HOPPER, code=80), broken_kernel.EARLY, 0),
        # A driver of CUDA 12.2, whose graphs know nothing of it.
        (replace(HOPPER, driver=12020), broken_kernel.EARLY, 0),
    ],
)
def test_kernels_start_early_only_where_they_wait_and_graphs_know(library, device, choices, early):
    found = broken_kernel.early_launches(library, device, choices)
    DEVICE.configure(library)
    assert found == early


# Each way to start early and not to wait; the emulation ends the program and says so.
_WAIT = "  if (!a.appendsInDecode) waitForPrevious();\n"
EARLY_MUTATIONS = {
    "combine_does_not_wait": ("rows.cu", "combine.cuh", "  waitForPrevious();\n", ""),
    "decode_does_not_wait": ("decode_float16.cu", "decode.cuh", _WAIT, ""),
    "keys_are_loaded_before_the_wait": (
        *("decode_float16.cu", "decode.cuh"),
        *(_WAIT, "  if (tile < end) warp.loadKeys(tile);\n" + _WAIT),
    ),
    "old_code_starts_early": (
        *("rows.cu", "device.cuh"),
        *("shape.early = version >= kWaitingCode;", ""),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", EARLY_MUTATIONS)
def test_a_kernel_that_starts_early_and_does_not_wait_is_found(library, folder, tmp_path, mutation):
    mutant = kernel_build.broken_library(folder, *EARLY_MUTATIONS[mutation], tmp_path)
    command = [sys.executable, "-m", "tests.support.broken_kernel", str(mutant), "early"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "without waiting for the kernel ahead" in done.stderr


def test_the_kernels_that_are_broken_above_wait(library):
    found = broken_kernel.start_early(str(library.path))
    DEVICE.configure(library)
    assert not found


def test_all_splits_give_what_one_gives(library):
    one, *others = (
        step(library, LONG, (10**7, 90), (1, 1), choices=Choices(splits=splits))
        for splits in (1, 2, 7, 8, 9, 31, 64)
    )
    for other in others:
        assert all(map(torch.equal, one[1:], other[1:]))
        torch.testing.assert_close(one[0], other[0], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", streams.HALF_TYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_the_last_block_combines_every_kind_of_row(library, dtype, int8):
    """Every ratio of heads and head dimension, learned logits, ragged steps, in both orders."""
    shapes = streams.some_shape_streams(dtype, step=3)
    chosen = [*shapes, *streams.long_streams(dtype)[:2], streams.feature_streams(dtype)[14]]
    for index, stream in enumerate(chosen):
        DEVICE.configure(library, reverse=bool(index % 2))
        found = run_stream(library, DEVICE, replace(stream, int8_rings=int8), combine_in_last_block)
        assert found.problems == [], stream.name
        assert found.ratio <= LARGEST_RATIO, stream.name
    DEVICE.configure(library)


@pytest.mark.parametrize("appends", [True, False])
def test_the_last_block_saves_the_launch_that_combines(library, appends):
    case, steps = streams.SMALL.with_(window_size=1511), ((10**6, 7), (1, 1))
    inputs, outputs, attributes = one_step(case, *steps, torch.float16)
    params = params_of(inputs, outputs, attributes)
    arrivals = library.arrivals(params, "cpu")
    assert arrivals.shape == (2 * case.num_kv_heads,)
    reset_counters(library)
    results = []
    for splits in (0, 64, 2):
        choices = Choices(splits=splits, appends_in_decode=appends, arrivals=arrivals)
        workspace = torch.full((library.workspace_size(params) // 4,), float("nan"))
        library.launch(params, workspace, choices=choices)
        assert not arrivals.any()
        results.append(outputs[0].clone())
    assert counters(library).launches == 3 * (2 - appends)
    kernel = step(library, case, *steps)[0]
    for result in results:
        torch.testing.assert_close(result, kernel, rtol=2e-3, atol=2e-3)


def test_an_infinite_value_stays_one_whoever_combines(library):
    inputs, outputs, attributes = one_step(LONG, (10**6,), (1,), torch.float16)
    params = params_of(inputs, outputs, attributes)
    slot = (10**6 - 3) % inputs[3].shape[2]
    inputs[4][:, :, slot, 5] = float("inf")
    workspace = torch.full((library.workspace_size(params) // 4,), float("nan"))
    results = []
    for arrivals in (None, library.arrivals(params, "cpu")):
        library.launch(params, workspace, choices=Choices(splits=3, arrivals=arrivals))
        results.append(outputs[0].clone())
    assert torch.isinf(results[0][..., 5]).all()
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


def test_counters_are_not_touched_where_nothing_is_combined(library):
    inputs, outputs, attributes = one_step(LONG, (10**6,), (1,), torch.float16)
    params = params_of(inputs, outputs, attributes)
    arrivals = torch.full((2,), 7, dtype=torch.int32)
    library.launch(params, None, choices=Choices(arrivals=arrivals))
    assert arrivals.tolist() == [7, 7]


def test_misaligned_counters_are_refused(library):
    inputs, outputs, attributes = one_step(LONG, (10**6,), (1,), torch.float16)
    params = params_of(inputs, outputs, attributes)
    arrivals = torch.zeros(16, dtype=torch.uint8)[2:]
    with pytest.raises(KernelError, match="cudaErrorInvalidValue"):
        library.launch(params, torch.empty(2**20), choices=Choices(splits=3, arrivals=arrivals))


def test_splits_that_the_workspace_does_not_hold_are_refused(library):
    inputs, outputs, attributes = one_step(LONG, (10**6,), (1,), torch.float16)
    params = params_of(inputs, outputs, attributes)
    with pytest.raises(KernelError, match="cudaErrorInvalidValue"):
        library.launch(params, torch.empty(1024), choices=Choices(splits=8))
    with pytest.raises(KernelError, match="cudaErrorInvalidValue"):
        library.launch(params, torch.empty(10**6), choices=Choices(splits=65))


# What must not go unnoticed: each line of a kernel replaced by a wrong one.
MUTATIONS = {
    "new_key_read_before_it_is_written": (
        "decode_float16.cu",
        "decode.cuh",
        "tile < end && !(appends && tile == tiles - 1)",
        "tile < end",
    ),
    "padding_is_not_appended": (
        "decode_float16.cu",
        "decode.cuh",
        "split == a.splits - 1;",
        "split == a.splits - 1 && real > 0;",
    ),
    "appended_by_the_first_split": (
        "decode_float16.cu",
        "decode.cuh",
        "split == a.splits - 1;",
        "split == 0;",
    ),
    "values_requested_before_they_are_used_up": (
        "decode_float16.cu",
        "decode.cuh",
        "    warp.multiplyValues(tile, weights);\n    if constexpr (kValuesAhead) {",
        "    if (next < end) warp.loadValues(next);\n"
        "    warp.multiplyValues(tile, weights);\n    if constexpr (false) {",
    ),
    "combine_reads_a_split_too_many": (
        "rows.cu",
        "combine.cuh",
        "if (split >= a.splits) continue;",
        "if (split > a.splits) continue;",
    ),
    "combine_forgets_other_maxima": (
        "rows.cu",
        "combine.cuh",
        "all += weights[other] * sums",
        "all += sums",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(library, folder, tmp_path, mutation):
    mutant = KernelLibrary(kernel_build.broken_library(folder, *MUTATIONS[mutation], tmp_path))
    assert is_found(mutant, LONG.with_(num_heads=4, num_kv_heads=1))


# The same of what combines in the last block.
_LAST = ("decode_float16.cu", "combine_last.cuh")
LAST_BLOCK_MUTATIONS = {
    "combines_a_block_too_early": (*_LAST, "blockIdx.x, a.splits)", "blockIdx.x, a.splits - 1)"),
    "counts_for_all_heads_together": (*_LAST, "a.arrivals + blockIdx.x", "a.arrivals"),
    "results_overwritten_before_they_are_read": (
        *(*_LAST, "  syncBlock();  // parts are written, results in shared memory are read\n", ""),
    ),
    "weights_read_before_they_are_written": (
        *(*_LAST, "allRows, weights);\n  syncBlock();", "allRows, weights);"),
    ),
    "logit_of_another_head": (
        *(*_LAST, "group.head(a, group.firstRow + row)", "group.head(a, group.firstRow)"),
    ),
    "forgets_a_maximum": (*_LAST, "exp2Fast(maximum[1] - base)", "1.0f"),
    "total_of_half_the_splits": (*_LAST, " + weight[1] * total[1]", ""),
    "a_split_too_many": (*_LAST, "= split < a.splits;", "= split <= a.splits;"),
    "values_of_the_first_row": (*_LAST, "firstRow + row) * D +", "firstRow) * D +"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", LAST_BLOCK_MUTATIONS)
def test_a_broken_last_block_is_found(library, folder, tmp_path, mutation):
    broken = kernel_build.broken_library(folder, *LAST_BLOCK_MUTATIONS[mutation], tmp_path)
    case = LONG.with_(num_heads=8, num_kv_heads=1, sink_logits=True, window_size=811)
    assert is_found(KernelLibrary(broken), case, combine_in_40)


def test_the_last_block_that_is_broken_above_is_right(library):
    case = LONG.with_(num_heads=8, num_kv_heads=1, sink_logits=True, window_size=811)
    assert not is_found(library, case, combine_in_40)


def combine_in_40(library, params, workspace, device):
    arrivals = library.arrivals(params, device.name)
    library.launch(params, workspace, choices=Choices(splits=40, arrivals=arrivals))


def is_found(library, case, enqueue=None):
    chunks = ((1, 1), (1, 0), (1, 1))
    found = []
    for reverse in (False, True):
        DEVICE.configure(library, reverse=reverse)
        outcome = run_stream(library, DEVICE, Stream("", case, (10**6, 3), chunks), enqueue)
        found.append(bool(outcome.problems) or outcome.error > LARGEST_RATIO * outcome.torch_error)
    DEVICE.configure(library)
    return any(found)
