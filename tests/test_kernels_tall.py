"""Chunks by warps of 32 query rows, on the block emulation, against the mathematics."""

from __future__ import annotations

import pytest
import torch

from scripts.gpu import streams
from scripts.gpu.check import Stream, run_stream
from scripts.gpu.emulated_device import EmulatedDevice
from scripts.gpu.kernel_library import KernelLibrary, params_of
from tests.support import kernel_build
from tests.support.kernel_case import assert_a_chunk_copies_what_its_rows_see, one_step

pytestmark = pytest.mark.skipif(kernel_build.compiler() is None, reason=kernel_build.NO_COMPILER)
DEVICE = EmulatedDevice()
LARGEST_RATIO = 2.0  # error in units of torch's in the same precision


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return kernel_build.shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def tall(folder):
    """A library that takes warps of 32 query rows wherever it can."""
    return KernelLibrary(kernel_build.emulated_library(folder), "tall")


def most_rows(stream):
    """Of one key/value head in one call."""
    return stream.case.num_heads // stream.case.num_kv_heads * max(map(max, stream.chunks))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(stream, id=stream.name)
        for dtype in streams.HALF_TYPES
        for stream in (
            *streams.tile_streams(dtype, streams.TALL_HEAD_DIMS),
            *(x for x in streams.long_streams(dtype) if x.name.startswith("chunks")),
            *streams.some_shape_streams(dtype, 3),
            *streams.feature_streams(dtype),
        )
    ],
)
def test_chunks_match_float64_in_every_head_dimension(tall, stream):
    DEVICE.configure(tall)
    outcome = run_stream(tall, DEVICE, stream)
    assert not outcome.problems
    assert outcome.error <= LARGEST_RATIO * outcome.torch_error
    takes = stream.case.head_dim in streams.TALL_HEAD_DIMS
    assert ("tiles_tall" in outcome.kernels) == (takes and most_rows(stream) > 16)
    assert not takes or outcome.kernels <= {"decode8", "decode16", "tiles_tall"}
    if stream.name.startswith(("tiles_split", "tiles_not_split")):
        assert (outcome.splits > 1) == stream.with_workspace


@pytest.mark.parametrize("head_dim", streams.TALL_HEAD_DIMS)
def test_the_order_in_which_warps_run_changes_no_bit(tall, head_dim):
    case = streams.SMALL.with_(
        window_size=211, num_heads=6, num_kv_heads=2, chunk_size=67,
        head_dim=head_dim, rotary_dim=head_dim,
    )  # fmt: skip
    results = []
    for reverse in (False, True):
        DEVICE.configure(tall, reverse=reverse)
        inputs, outputs, attributes = one_step(case, (300, 10**7), (67, 41), torch.float16)
        tall.launch(params_of(inputs, outputs, attributes), None)
        results.append(outputs[0])
    DEVICE.configure(tall)
    assert torch.equal(*results)


def test_a_chunk_copies_no_tile_outside_what_its_rows_see(tall):
    assert_a_chunk_copies_what_its_rows_see(tall)


# What must not go unnoticed: each line of what these warps do in their own way, replaced by a wrong
# one.
TALL_MUTATIONS = {
    "range_of_the_first_rows": (
        "tiles_warp.cuh",
        "first[8 * side].range",
        "first[side % 2 * 8].range",
    ),
    "query_of_the_first_rows": (
        "tiles_warp.cuh",
        "const int row = rowTile * 16 + lane % 16;",
        "const int row = lane % 16;",
    ),
    "fragment_of_the_first_rows": (
        "tiles_warp.cuh",
        "products[rowTile][2 * pair], fragment[rowTile]",
        "products[rowTile][2 * pair], fragment[0]",
    ),
    "sums_of_the_first_rows": (
        "tiles_warp.cuh",
        "sum[side / 2][tile][first] *= carried;",
        "sum[0][tile][first] *= carried;",
    ),
    "maximum_of_the_first_rows": (
        "tiles.cuh",
        "a.partialStats[part * 2] = warp.maximum[side];",
        "a.partialStats[part * 2] = warp.maximum[side % 2];",
    ),
    "total_of_the_first_rows": (
        "tiles.cuh",
        "a.partialStats[part * 2 + 1] = warp.total[side];",
        "a.partialStats[part * 2 + 1] = warp.total[side % 2];",
    ),
    "sums_not_rescaled": (
        "tiles_warp.cuh",
        "carried == 1.0f) continue",
        "carried > 0.5f) continue",
    ),
    "warps_16_rows_apart": (
        "tiles_tall.cuh",
        "firstRow = thread / 32 * 16 * kTallRowTiles;",
        "firstRow = thread / 32 * 16;",
    ),
    "slope_of_another_row": ("tiles_tall.cuh", "group.head(a, row))", "group.head(a, firstRow))"),
    "keys_not_awaited": (
        "tiles_tall.cuh",
        "    waitCopies<0>();\n    syncBlock();\n    copyRowsOf",
        "    syncBlock();\n    copyRowsOf",
    ),
    "values_not_awaited": (
        "tiles_tall.cuh",
        "    waitCopies<0>();\n    syncBlock();\n    if",
        "    syncBlock();\n    if",
    ),
    "keys_of_slower_warps_overwritten": (
        "tiles_tall.cuh",
        "    syncBlock();\n    if",
        "    if",
    ),
    "values_of_slower_warps_overwritten": (
        "tiles_tall.cuh",
        "    syncBlock();\n    copyRowsOf",
        "    copyRowsOf",
    ),
    "queries_over_tiles_in_use": ("tiles_tall.cuh", "  syncBlock();  // the next", "  // the next"),
    "ring_in_one_piece": ("tiles_tall.cuh", "slot + kKeys <= list.capacity", "slot >= 0"),
    "last_key_not_repeated": ("tiles_tall.cuh", "first + kKeys <= list.count", "first >= 0"),
}


def tall_streams():
    """Several tiles of sinks and of a ring that wraps, slopes, keys that are split and not."""
    case = streams.SMALL.with_(
        window_size=211, chunk_size=149, num_sink_tokens=83, num_heads=2, num_kv_heads=1, alibi=True
    )
    few = case.with_(chunk_size=67, num_heads=1, window_size=601, alibi=False)
    return [
        Stream("tall", case, (10**6, 10**9), ((149, 149), (149, 31))),
        Stream("tall_split", few, (10**6,), ((67,),)),
    ]


def unlike_float64(library):
    """Whether some stream by warps of 32 rows goes wrong."""
    DEVICE.configure(library)
    outcomes = [run_stream(library, DEVICE, stream) for stream in tall_streams()]
    assert [x.kernels for x in outcomes] == [{"tiles_tall"}] * 2
    assert [x.splits > 1 for x in outcomes] == [False, True]
    return any(x.problems or not x.error <= LARGEST_RATIO * x.torch_error for x in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", TALL_MUTATIONS)
def test_broken_warps_of_32_rows_are_found(tall, folder, tmp_path, mutation):
    change = TALL_MUTATIONS[mutation]
    mutant = kernel_build.broken_library(folder, "tiles_tall_float16.cu", *change, tmp_path)
    assert unlike_float64(KernelLibrary(mutant, "tall"))


def test_the_warps_of_32_rows_that_are_broken_above_are_right(tall):
    assert not unlike_float64(tall)
