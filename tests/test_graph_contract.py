"""The graph's contract: tensors, updates and bytes of every kind of cache follow from one place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lminf_export
from lminf_export.operator.bindings import BATCH, LayerSpec
from lminf_export.operator.graph_contract import GraphContract
from lminf_export.operator.settings import ring_capacity

# A Λ layer with sinks and a sliding one without, of different heads.
LAYERS = (LayerSpec(2, 16, 11, 3, 13, 21), LayerSpec(1, 8, 5, 0, 5, 14))
PACKAGE = Path(lminf_export.__file__).parent


@pytest.fixture(params=[("float32", None), ("float16", None), ("float16", "int8")], ids=str)
def contract(request):
    dtype, kv_cache_dtype = request.param
    return GraphContract(LAYERS, dtype, kv_cache_dtype, 131)


def test_bytes_are_those_of_the_tensors(contract):
    for slots in (None, {21: 20, 14: 1}):
        sizes = {**contract.ring_sizes(slots), BATCH: 1}
        specs = contract.caches(present=False)
        assert contract.cache_bytes(slots) == sum(spec.nbytes(sizes) for spec in specs)


def test_every_cache_is_updated_by_an_output_of_its_type_and_shape(contract):
    inputs = {spec.name: spec for spec in contract.inputs()}
    outputs = {spec.name: spec for spec in contract.outputs()}
    rings, sinks = contract.ring_updates(), contract.sink_updates()
    assert not rings.keys() & sinks.keys()
    assert {**rings, **sinks}.keys() == {spec.name for spec in contract.caches(present=False)}
    for past, present in {**rings, **sinks}.items():
        assert inputs[past].dtype == outputs[present].dtype
        assert inputs[past].shape == outputs[present].shape
    assert len(sinks) == 2, "a layer without starting tokens has no tensors for them"


def test_only_rings_change_with_the_kind_of_cache():
    plain, int8 = (GraphContract(LAYERS, "float16", kind, 131) for kind in (None, "int8"))
    assert int8.sink_updates() == plain.sink_updates()
    assert plain.ring_updates().items() < int8.ring_updates().items()
    assert int8.layer_bytes(LAYERS[0], 1, 0) == 2 * 2 * (16 + 4)
    assert int8.layer_bytes(LAYERS[0], 0, 1) == plain.layer_bytes(LAYERS[0], 0, 1)


def test_the_contract_needs_neither_torch_nor_onnx():
    code = (
        "import sys, lminf_export.operator.graph_contract; "
        "assert not {'torch', 'onnx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_ring_rule_is_written_once():
    rule = re.compile(r"-\(-.*chunk_size|window_size \+ .*chunk_size - 1")
    files = [path for path in PACKAGE.rglob("*.py") if rule.search(path.read_text("utf-8"))]
    assert files == [PACKAGE / "operator" / "settings.py"]
    assert ring_capacity(11, 7) == 21
