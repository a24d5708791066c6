"""The compiler's word on the kernels, where nvcc is present: no spills, few enough registers."""

from __future__ import annotations

import json
import shutil

import pytest

from scripts.gpu import kernels_ptxas
from scripts.gpu.kernel_library import SUPPORTED_HEAD_DIMS
from scripts.gpu.streams import TALL_HEAD_DIMS
from tests.support.kernel_build import ROOT

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: registers and spills are not checked"
)
RESULT = ROOT / "benchmarks" / "results" / "kernels-ptxas.json"


def check_decode(kernels):
    decode = [k for k in kernels if k["kernel"] == "decodeKernel"]
    assert {k.get("rings") for k in decode} == {None, "int8"}
    assert {k["head_dim"] for k in decode} == set(SUPPORTED_HEAD_DIMS)
    assert [k for k in decode if k["spill_bytes"] or k["stack_bytes"]] == []
    for kernel in decode:
        # What the planner counts on (decodeBlocksPerMultiprocessor).
        full = kernel["head_dim"] <= 128 and (kernel["query_rows"] == 8 or kernel["head_dim"] == 64)
        blocks = 4 if kernel["head_dim"] == 32 else 3 if full else 2
        assert kernel["blocks_per_multiprocessor"] >= blocks, kernel


@needs_nvcc
@pytest.mark.slow
def test_decode_kernels_do_not_spill_where_most_of_them_run():
    check_decode(kernels_ptxas.report(kernels_ptxas.DECODE_SOURCES, ("80", "90")))


@needs_nvcc
@pytest.mark.slow
def test_the_other_kernels_compile_and_do_not_spill():
    sources = ("tiles_bfloat16.cu", "tiles_float16_int8.cu", "rows.cu")
    kernels = kernels_ptxas.report(sources, ("90",))
    assert [k for k in kernels if k["spill_bytes"] or k["stack_bytes"]] == []
    assert {k["kernel"] for k in kernels} == {
        *("appendKernel", "combineKernel", "simpleKernel", "tilesKernel")
    }


def check_tall(kernels):
    """Two blocks a multiprocessor, as the planner counts on, and no spill."""
    tall = [k for k in kernels if k["kernel"] == "tilesTallKernel"]
    assert {k["head_dim"] for k in tall} == set(TALL_HEAD_DIMS)
    assert {k.get("rings") for k in tall} == {None}
    assert [k for k in tall if k["spill_bytes"] or k["stack_bytes"]] == []
    assert {k["threads"] for k in tall} == {128}
    assert min(k["blocks_per_multiprocessor"] for k in tall) == 2


@needs_nvcc
@pytest.mark.slow
def test_warps_of_32_rows_do_not_spill_where_most_of_them_run():
    check_tall(kernels_ptxas.report(("tiles_tall_float16.cu",), ("80", "90", "120")))


@needs_nvcc
@pytest.mark.slow
def test_the_hopper_kernel_compiles_and_neither_spills_nor_waits_for_each_product():
    kernels = kernels_ptxas.report(architectures=(kernels_ptxas.HOPPER_ARCHITECTURE,))
    assert [k for k in kernels if k["spill_bytes"] or k["stack_bytes"]] == []
    assert {k["kernel"] for k in kernels} == {"tilesHopperKernel"}
    # 384 threads share 64 Ki registers before warpgroups give and take.
    assert {k["registers"] for k in kernels} == {168}


def test_the_recorded_report_covers_all_architectures_without_spills():
    kernels = json.loads(RESULT.read_text())["kernels"]
    assert {k["architecture"] for k in kernels} == set(kernels_ptxas.ARCHITECTURES)
    check_decode(kernels)
    check_tall(kernels)
    assert [k for k in kernels if k["spill_bytes"]] == []


def test_the_report_reads_what_ptxas_says():
    said = """ptxas info    : Compiling entry function \
'_ZN5lminf12decodeKernelINS_4HalfELi128ELi2EEEvNS_15KernelArgumentsE' for 'sm_80'
ptxas info    : Function properties for _ZN5lminf12decodeKernelINS_4HalfELi128ELi2EEEv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 244 registers, used 1 barriers, 584 bytes cmem[0]
"""
    (kernel,) = kernels_ptxas.parse(said)
    assert kernel == {
        "architecture": "80", "kernel": "decodeKernel", "dtype": "float16", "head_dim": 128,
        "query_rows": 16, "threads": 128, "stack_bytes": 16, "spill_bytes": 12, "registers": 244,
        "blocks_per_multiprocessor": 2,
    }  # fmt: skip


def test_the_report_tells_kernels_over_rings_of_int8_apart():
    name = "_ZN5lminf11tilesKernelINS_8Bfloat16ENS_4Int8ELi128ELi8EEEvNS_15KernelArgumentsE"
    assert kernels_ptxas.kernel_name(name) == ("tilesKernel", "bfloat16", True, [128, 8])


def test_documents_say_what_the_recorded_machine_code_has():
    record = json.loads((RESULT.parent / "kernels-sass.json").read_text())["kernels"]
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert {k["kernel"] for k in record} == {
        *("decodeKernel", "tilesKernel", "tilesTallKernel", "tilesHopperKernel")
    }
    (decode,) = (k for k in record if k["kernel"] == "decodeKernel" and k["template"] == [128, 1])
    assert f"takes at most {decode['tile']} (SASS" in page
    assert f"first load of a key stand {decode['ahead_of_first_key']}," in page
    (hopper,) = (k for k in record if k["kernel"] == "tilesHopperKernel" and k["template"] == [128])
    assert f"takes at most {hopper['copying_a_tile']} instructions" in page
    for architecture in ("80", "90"):
        found: dict = {}
        for kernel in record:
            if kernel["architecture"] == architecture and kernel["kernel"].startswith("tiles"):
                head_dim = kernel["template"][0]
                counted = "{LDSM} / {HMMA}".format(**kernel["tile"])
                found.setdefault(head_dim, {}).setdefault(kernel["kernel"], set()).add(counted)
        for head_dim in (32, 64, 80, 96, 128):
            (narrow,), (tall,) = (found[head_dim][k] for k in ("tilesKernel", "tilesTallKernel"))
            assert f"| {head_dim} | {narrow} |" in page
            assert f"| {tall} |" in page
