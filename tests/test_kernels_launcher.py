"""What the launcher decides before anything runs: validity, kernel, splits, workspace, spans."""

from __future__ import annotations

import ctypes
import itertools
import random
import subprocess

import pytest

from lminf_export.engine.plugin import HEAD_DIMS
from scripts.gpu.kernel_library import (
    PREFERENCES,
    SUPPORTED_HEAD_DIMS,
    KernelError,
    KernelLibrary,
    Params,
)
from scripts.gpu.streams import TALL_HEAD_DIMS
from tests.support import kernel_build

pytestmark = pytest.mark.skipif(kernel_build.compiler() is None, reason=kernel_build.NO_COMPILER)
POINTERS = [name for name, kind in Params._fields_ if kind is ctypes.c_void_p]
H100 = {"multiprocessors": 132, "shared_bytes": 233472}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return KernelLibrary(
        kernel_build.emulated_library(kernel_build.shared_folder(tmp_path_factory))
    )


def params(**changes) -> Params:
    sizes = {
        "data_type": 1, "batch_size": 2, "num_heads": 8, "num_kv_heads": 2, "sequence_length": 1,
        "capacity": 4352, "head_dim": 128, "num_sink_tokens": 16, "window_size": 4096,
        "distance_limit": 4096, "rotary_dim": 128, "scale": 0.1,
    }  # fmt: skip
    return Params(**{**dict.fromkeys(POINTERS, 4096), **sizes, **changes})


def test_valid_params_are_taken(library):
    assert library.problem(params()) == ""


def test_the_kernels_take_the_head_dimensions_that_the_exporter_expects(library):
    taken = [d for d in range(4, 520, 4) if not library.problem(params(head_dim=d, rotary_dim=4))]
    assert tuple(taken) == SUPPORTED_HEAD_DIMS == HEAD_DIMS


WRONG = {
    "head_dim = 72: the kernels take 32, 64, 80, 96, 128 and 256": {"head_dim": 72},
    "data type 7: the kernels take float32, float16 and bfloat16": {"data_type": 7},
    "batch size B = 0: must be at least 1": {"batch_size": 0},
    "query heads H = -3: must be at least 1": {"num_heads": -3},
    "key/value heads G = 0: must be at least 1": {"num_kv_heads": 0},
    "new tokens S = 0: must be at least 1": {"sequence_length": 0},
    "query heads H = 8: must be a multiple of key/value heads G = 3": {"num_kv_heads": 3},
    "must be at least window_size + S - 1 = 4096 + 300 - 1": {"sequence_length": 300},
    "ring slots C = 64: fewer than the S = 65": {"capacity": 64, "sequence_length": 65},
    "rotary_dim = 31: must be even": {"rotary_dim": 31},
    "rotary_dim = 130: must be even and in 0 ... head_dim = 128": {"rotary_dim": 130},
    "distance_limit = 4095: must be in window_size = 4096": {"distance_limit": 4095},
    "window_size = 0: must be in 1 ... 2^40": {"window_size": 0},
    "num_sink_tokens = -1": {"num_sink_tokens": -1},
    "softcap = -1: must be finite": {"softcap": -1.0},
    "scale = nan: must be finite": {"scale": float("nan")},
    "past_sink_key has 1 rows: must have B = 2": {"sink_batch_size": 1},
    "ring slots C = 8388609: must be at most 8388608": {"capacity": 2**23 + 1},
    "B * H * S": {"batch_size": 2**28},
    "query is a null pointer": {"query": 0},
    "past_key at 0x1008: must be aligned to 16 bytes": {"past_key": 4104},
    "new_length at 0x1004: must be aligned to 8 bytes": {"new_length": 4100},
    "limit_sin is a null pointer": {"limit_sin": None},
    "present_sink_value is a null pointer": {"present_sink_value": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_in_one_line(library, message):
    wrong = params(**WRONG[message])
    problem = library.problem(wrong)
    assert message in problem
    assert problem.startswith("LambdaAttention: ")
    assert "\n" not in problem
    with pytest.raises(KernelError, match="LambdaAttention"):
        library.launch(wrong, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_dim": 0, "cos": None, "sin": None, "limit_cos": None, "limit_sin": None},
        {
            "num_sink_tokens": 0,
            "sink_batch_size": 1,
            "present_sink_key": 0,
            "present_sink_value": 0,
        },
        {"alibi_slopes": None, "sink_logits": None},
        {"query_position": None, "slot_position": None},
        {"capacity": 64, "growing_ring": True},
    ],
)
def test_what_a_layer_does_not_use_may_be_absent(library, changes):
    if changes.get("num_sink_tokens") == 0:
        changes = {**changes, "past_sink_key": None, "past_sink_value": None}
    assert library.problem(params(**changes)) == ""


@pytest.mark.parametrize(
    ("heads", "kv_heads", "steps", "head_dim", "data_type", "kernel"),
    [
        (32, 32, 1, 128, 1, "decode8"),
        (32, 8, 1, 128, 2, "decode8"),
        (32, 4, 1, 128, 1, "decode8"),
        (36, 4, 1, 128, 1, "decode16"),
        (32, 8, 4, 128, 1, "decode16"),
        (36, 4, 1, 256, 1, "tiles64"),
        (32, 8, 5, 128, 1, "tiles64"),
        (71, 1, 1, 64, 1, "tiles128"),
        (32, 8, 256, 128, 1, "tiles128"),
        (32, 8, 256, 256, 1, "tiles64"),
        (36, 4, 1, 32, 1, "decode16"),
        (32, 8, 256, 32, 1, "tiles128"),
        (32, 8, 1, 128, 0, "simple"),
    ],
)
def test_the_kernel_follows_from_rows_per_key_head(
    library, heads, kv_heads, steps, head_dim, data_type, kernel
):
    made = params(
        num_heads=heads, num_kv_heads=kv_heads, sequence_length=steps, head_dim=head_dim,
        data_type=data_type, rotary_dim=head_dim,
    )  # fmt: skip
    assert library.problem(made) == ""
    assert library.plan(made, **H100, workspace_bytes=2**30).kernel == kernel


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"sequence_length": 256}, "tiles_hopper"),
        ({"sequence_length": 256, "head_dim": 64}, "tiles_hopper"),
        ({"sequence_length": 256, "head_dim": 96}, "tiles128"),
        ({"sequence_length": 256, "int8_cache": True}, "tiles128"),
        ({"sequence_length": 256, "data_type": 0}, "simple"),
        ({"sequence_length": 16}, "tiles64"),
        ({}, "decode8"),
    ],
)
def test_compute_capability_9_0_has_a_kernel_of_its_own(library, changes, kernel):
    made = params(rotary_dim=64, **changes)
    asked = KernelLibrary(library.path, "by_device")
    assert asked.plan(made, **H100, workspace_bytes=0, hopper=True).kernel == kernel
    assert asked.plan(made, 132, 65536, 0, hopper=True).kernel != "tiles_hopper"
    assert asked.plan(made, **H100, workspace_bytes=0).kernel != "tiles_hopper"


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        *(({"sequence_length": 256, "head_dim": dim}, "tiles_tall") for dim in (32, 80, 96, 128)),
        ({"sequence_length": 256, "data_type": 2}, "tiles_tall"),
        ({"sequence_length": 5}, "tiles_tall"),
        ({"sequence_length": 4}, "decode16"),
        ({}, "decode8"),
        ({"sequence_length": 256, "head_dim": 256}, "tiles64"),
        ({"sequence_length": 256, "int8_cache": True}, "tiles128"),
        ({"sequence_length": 256, "data_type": 0}, "simple"),
    ],
)
def test_warps_of_32_rows_take_chunks_over_rings_of_16_bits_where_asked_for(
    library, changes, kernel
):
    made = params(rotary_dim=32, **changes)
    plan = KernelLibrary(library.path, "tall").plan(made, **H100, workspace_bytes=0, hopper=True)
    assert plan.kernel == kernel
    if kernel == "tiles_tall":
        assert (plan.threads, plan.rows_per_block, plan.keys_per_tile) == (128, 128, 64)
        assert plan.row_blocks == -(-4 * made.sequence_length // 128)


@pytest.mark.parametrize("head_dim", TALL_HEAD_DIMS)
def test_two_blocks_of_warps_of_32_rows_share_a_multiprocessor_of_an_a100(library, head_dim):
    made = params(sequence_length=256, head_dim=head_dim, rotary_dim=32)
    tall = KernelLibrary(library.path, "tall")
    plan = tall.plan(made, 108, 163 * 1024, workspace_bytes=0)
    assert 2 * (plan.shared_bytes + 1024) <= 164 * 1024
    small = tall.plan(made, 108, plan.shared_bytes - 16, workspace_bytes=0)
    assert (plan.kernel, small.kernel) == ("tiles_tall", "tiles128")


@pytest.mark.parametrize("preference", ["portable", "by_device"])
def test_warps_of_32_rows_are_not_chosen_by_themselves(library, preference):
    asked = KernelLibrary(library.path, preference)
    for hopper, steps in itertools.product((False, True), (5, 256)):
        made = params(rotary_dim=64, sequence_length=steps)
        plan = asked.plan(made, **H100, workspace_bytes=2**30, hopper=hopper)
        assert plan.kernel != "tiles_tall"


def test_a_kernel_that_no_device_has_run_is_not_chosen_by_itself(library):
    made = params(rotary_dim=64, sequence_length=256)
    assert library.plan(made, **H100, workspace_bytes=0, hopper=True).kernel == "tiles128"


@pytest.mark.parametrize(
    ("preference", "hopper"), [("by_device", False), ("by_device", True), ("tall", False)]
)
def test_a_chunk_is_split_by_what_one_block_sees(library, preference, hopper):
    library = KernelLibrary(library.path, preference)
    size = {"num_heads": 1, "num_kv_heads": 1, "batch_size": 1, "capacity": 8192}
    for window, splits in ((64, False), (4096, True)):
        made = params(window_size=window, sequence_length=4096, **size)
        workspace = library.workspace_size(made)
        plan = library.plan(made, **H100, workspace_bytes=workspace, hopper=hopper)
        assert (plan.splits > 1) == splits


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])  # A100, H100 and H200, B200
@pytest.mark.parametrize(
    ("kv_heads", "batch"), [(8, 1), (32, 1), (8, 8), (32, 8), (8, 64), (32, 64)]
)
def test_the_busiest_multiprocessor_has_6_percent_more_keys_than_its_share_at_most(
    library, kv_heads, batch, multiprocessors
):
    made = params(num_heads=32, num_kv_heads=kv_heads, batch_size=batch)
    size = library.workspace_size(made)
    plan = library.plan(made, multiprocessors, 233472, workspace_bytes=size)
    tiles = 1 + 4096 // plan.keys_per_tile
    blocks = kv_heads * batch
    most = -(-blocks * plan.splits // multiprocessors) * -(-tiles // plan.splits)
    assert most <= 1.06 * blocks * tiles / multiprocessors


def test_keys_that_fill_the_multiprocessors_by_themselves_are_not_split(library):
    made = params(num_heads=32, num_kv_heads=32, batch_size=8)  # 256 blocks, two of each 132
    plan = library.plan(made, **H100, workspace_bytes=library.workspace_size(made))
    assert plan.splits == 1


def test_one_row_is_split_so_that_each_warp_takes_two_tiles(library):
    made = params(num_heads=32, num_kv_heads=8, batch_size=1)
    plan = library.plan(made, **H100, workspace_bytes=library.workspace_size(made))
    tiles = -(-(4096 + made.num_sink_tokens) // plan.keys_per_tile)
    assert -(-tiles // plan.splits) == 2 * 4


def test_decode_takes_all_rows_of_a_key_head_in_one_block(library):
    """So one block appends where the decode kernel appends, and no other one looks there."""
    kernels = set()
    for head_dim in SUPPORTED_HEAD_DIMS:
        for group, steps in itertools.product(range(1, 24), (1, 2, 3)):
            made = params(
                num_heads=2 * group, sequence_length=steps, head_dim=head_dim, rotary_dim=32
            )
            plan = library.plan(made, **H100, workspace_bytes=library.workspace_size(made))
            kernels.add(plan.kernel)
            assert plan.row_blocks == 1 or not plan.kernel.startswith("decode")
    assert {"decode8", "decode16"} < kernels


def test_splits_need_no_more_than_the_workspace_given(library):
    made = params(num_heads=32, num_kv_heads=8, batch_size=1)
    one_split = 32 * (128 + 2) * 4
    assert library.plan(made, **H100, workspace_bytes=0).splits == 1
    assert library.plan(made, **H100, workspace_bytes=3 * one_split + 1).splits <= 3
    assert library.plan(made, **H100, workspace_bytes=library.workspace_size(made)).splits > 3


def test_the_workspace_of_the_largest_shape_covers_every_smaller_one(library):
    rng = random.Random(0)
    for _ in range(2000):
        kv_heads, group = rng.choice([1, 2, 8, 32]), rng.choice([1, 4, 7, 16, 71])
        head_dim = rng.choice(SUPPORTED_HEAD_DIMS)
        batch, steps = rng.choice([1, 4, 64, 256]), rng.choice([1, 3, 64, 256, 1024])
        layer = {"num_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": head_dim,
                 "capacity": 6144, "rotary_dim": 32}  # fmt: skip
        largest = params(batch_size=batch, sequence_length=steps, **layer)
        smaller = params(
            batch_size=rng.randint(1, batch), sequence_length=rng.randint(1, steps), **layer
        )
        size = library.workspace_size(largest)
        assert library.workspace_size(smaller) <= size
        multiprocessors = rng.choice([1, 20, 108, 132, 160])
        hopper = rng.choice([False, True])
        asked = KernelLibrary(library.path, rng.choice(PREFERENCES))
        plan = asked.plan(smaller, multiprocessors, 233472, 2**40, hopper=hopper)
        rows = smaller.batch_size * smaller.num_heads * smaller.sequence_length
        if plan.splits > 1:
            assert plan.splits * rows * (head_dim + 2) * 4 <= size


def test_every_plan_fits_the_smallest_shared_memory(library):
    for head_dim in SUPPORTED_HEAD_DIMS:
        for steps in (1, 2, 4, 16, 100):
            made = params(head_dim=head_dim, sequence_length=steps, rotary_dim=32)
            for preference in ("portable", "tall"):
                asked = KernelLibrary(library.path, preference)
                plan = asked.plan(made, 84, 102400, workspace_bytes=2**30)
                # What a block may have on SM 8.6, 8.9 and 12.0.
                assert plan.shared_bytes <= 99 * 1024
                assert plan.threads <= 256


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory):
    target = tmp_path_factory.mktemp("arithmetic") / "arithmetic.so"
    source = kernel_build.ROOT / "tests" / "support" / "kernel_arithmetic.cpp"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    includes = ["-I", str(kernel_build.KERNELS)]
    command = [str(kernel_build.compiler()), *flags, *includes, str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.floorMod.restype = ctypes.c_int64
    return library


def test_spans_hold_exactly_the_keys_that_some_query_sees(arithmetic):
    rng = random.Random(1)
    for _ in range(3000):
        window, sinks, chunk = rng.randint(1, 23), rng.randint(0, 29), rng.randint(1, 9)
        capacity = window + chunk - 1 + rng.randint(0, 7)
        past = rng.choice([0, 1, 7, 25, 10**6, 2**40 - 9]) + rng.randint(0, 8)
        real = rng.randint(0, chunk)
        first = rng.randint(0, chunk - 1)
        last = rng.randint(first, chunk - 1)
        result = (ctypes.c_int * 4)()
        arithmetic.keySpan(
            ctypes.c_int64(past), real, first, last, ctypes.c_int64(window), sinks, capacity, result
        )
        queries = [past + s for s in range(first, min(last, real - 1) + 1)]
        near = range(max(0, past - window), past + chunk)
        local = [j for j in near if any(0 <= p - j < window for p in queries)]
        far = [j for j in range(sinks) if any(p - j >= window for p in queries)]
        sink_count, ring_count, first_slot, first_relative = result
        assert ring_count == len(local)
        assert sink_count == len(far)
        if local:
            assert local == list(range(past + first_relative, past + first_relative + ring_count))
            slots = [arithmetic.ringSlot(first_slot, k, capacity) for k in range(ring_count)]
            assert slots == [j % capacity for j in local]


@pytest.mark.parametrize("past", [-1, -8, -9, -1000, -(2**31), -(2**40) + 10**6])
def test_a_past_that_cannot_be_sees_no_key(arithmetic, past):
    """splitBegin takes no number of tiles below 0, and who walks over keys no number below 0."""
    for real, window in itertools.product((1, 7), (7, 23, 2**40)):
        result = (ctypes.c_int * 4)()
        past_length, window_size = ctypes.c_int64(past), ctypes.c_int64(window)
        arithmetic.keySpan(past_length, real, 0, real - 1, window_size, 5, 29, result)
        sink_count, ring_count, *_ = result
        assert sink_count == 0
        assert ring_count == (past + real if -real < past < 0 else 0)


def test_splits_share_out_all_tiles(arithmetic):
    for tiles in (0, 1, 5, 64, 257, 2**26):
        for splits in (1, 3, 64):
            ends = [arithmetic.splitBegin(tiles, s, splits) for s in range(splits + 1)]
            sizes = [b - a for a, b in itertools.pairwise(ends)]
            assert ends[0] == 0
            assert ends[-1] == tiles
            assert max(sizes) - min(sizes) <= 1
            assert sizes[-1] == max(sizes)  # it appends: who appends reads the new key's tile


def test_quotients_are_exact(arithmetic):
    rng = random.Random(5)
    most = 2**31 - 1
    values = [1, 2, 3, 5, 7, 64, 641, 2**16 - 1, 2**16 + 1, 2**30, 2**30 + 1, most - 1, most]
    for value in [*values, *(rng.randint(1, 2 ** rng.randint(1, 31) - 1) for _ in range(2000))]:
        edges = [k * value + e for k in (1, 2, most // value) for e in (-1, 0, 1)]
        dividends = [0, 1, most, *(rng.randint(0, most) for _ in range(50)), *edges]
        dividends = [n for n in dividends if 0 <= n <= most]
        given = (ctypes.c_int * len(dividends))(*dividends)
        assert arithmetic.wrongQuotients(given, len(dividends), value) == 0, value


def test_rotary_pairs_are_mutual(arithmetic):
    for rotary_dim, interleaved in ((2, 0), (20, 0), (22, 1), (64, 0), (128, 1)):
        pairs = []
        for dim in range(rotary_dim):
            result = (ctypes.c_int * 3)()
            arithmetic.rotaryPair(dim, rotary_dim, interleaved, result)
            pairs.append(tuple(result))
        for dim, (partner, pair, sign) in enumerate(pairs):
            assert pairs[partner] == (dim, pair, -sign)
            assert sign == (-1 if dim < partner else 1)
        assert sorted(pair for _, pair, _ in pairs) == sorted([*range(rotary_dim // 2)] * 2)


def test_floor_mod_is_never_negative(arithmetic):
    for value in (-1, -7, -8, 0, 5, 7, 2**40 + 3):
        assert arithmetic.floorMod(ctypes.c_int64(value), ctypes.c_int64(7)) == value % 7
