"""`lminf::LinearNBits` and `LinearNBitsAdd`: the kernel against NumPy, and in a quantised model."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest

import lminf_export
from lminf_export.operator.linear_bodies import LINEAR_NBITS, LINEAR_NBITS_ADD
from lminf_export.quantize.config import BLOCK_SIZES, QuantizeConfig
from lminf_export.quantize.formats import BlockFormat
from lminf_export.runtime.kernels import INSTALLED
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from tests.support.kernel_sets import (
    INTEGER_SETS,
    SETS,
    asking_for_once,
    available_sets,
    instruction_set,
    needs_kernels,
)
from tests.support.linear_nodes import Weight, nbits_node
from tests.support.linear_sessions import numbers, session, steps_events
from tests.support.tiny_models import save_llama

# Few tokens and many; features that no block, vector or panel divides, and some that all do.
TOKENS = (0, 1, 2, 3, 5, 17, 64, 200)
FEATURES = ((1, 1), (5, 37), (67, 521), (131, 150), (64, 512))
EXACT, ROUNDED = 1, 4


def rounded(x: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations rounded block by block, and how far a tie that falls the other way takes each."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, -x.shape[1] % block_size)))
    blocks = padded.reshape(len(x), padded.shape[1] // block_size, block_size)
    scale = np.abs(blocks).max(2, keepdims=True) / 127
    levels = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    # float32 holds a level to 2⁻¹⁷, and two operations make it.
    tie = np.abs(np.abs(levels - np.rint(levels)) - 0.5) < 2.0**-15
    both = np.rint(levels) * scale, tie * scale
    flat = [a.reshape(padded.shape)[:, : x.shape[1]] for a in both]
    return flat[0], flat[1]


@pytest.mark.sampled
@needs_kernels
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", [EXACT, ROUNDED])
def test_the_kernel_is_the_product_with_the_dequantised_weight(level, bits, block_size):
    sets = available_sets(INTEGER_SETS if level == ROUNDED else SETS)
    kinds = ((np.float32, np.float32), (np.float16, np.float16), (np.float32, np.float16))
    cases = product(kinds, (True, False), FEATURES)
    for turn, ((dtype, scales), symmetric, (out, width)) in enumerate(cases):
        form, rank = BlockFormat(out, width, bits, block_size, symmetric), turn % 3
        weight = Weight.random(form, dtype, scales)
        model, dense = nbits_node(weight, level, rank, dtype), weight.dense
        runs = [session(model, str(INSTALLED), threads) for threads in (1, 2)]
        for tokens in TOKENS:
            x = numbers(tokens, (tokens, width), dtype)
            addend = numbers(2, (tokens, out)[2 - rank :], dtype) if rank else np.zeros(1)
            feed = {"x": x} | ({"addend": addend} if rank else {})
            near, slack = rounded(x, block_size) if level == ROUNDED else (x.astype(np.float64), 0)
            wanted = near @ dense.T + addend
            # Sums in float32, however they are ordered; ties that fall the other way; one
            # rounding to the result's type.
            size = np.abs(near) @ np.abs(dense).T + 1
            bound = size * 2.0**-20 + np.abs(wanted) * np.finfo(dtype).eps
            bound += np.abs(slack) @ np.abs(dense).T if level == ROUNDED else 0
            for name in sets:
                with instruction_set(name):
                    found = [run.run(None, feed)[0] for run in runs]
                np.testing.assert_array_equal(found[0], found[1])
                assert found[0].shape == wanted.shape
                wrong = np.abs(found[0] - wanted) > bound
                assert not wrong.any(), (name, dtype, scales, symmetric, out, width, rank, tokens)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_how_weights_are_asked_for_changes_no_bit(bits):
    weight = Weight.random(BlockFormat(67, 521, bits, 32, symmetric=False), np.float32)
    run = session(nbits_node(weight, ROUNDED, 0), str(INSTALLED))
    for name, tokens in product(available_sets(INTEGER_SETS), (1, 2, 5)):
        feed, found = {"x": numbers(tokens, (tokens, 521), np.float32)}, []
        for once in (True, False):
            with instruction_set(name), asking_for_once(once):
                found.append(run.run(None, feed)[0])
        np.testing.assert_array_equal(*found)


@needs_kernels
@pytest.mark.parametrize("level", [EXACT, ROUNDED])
def test_numbers_at_the_ends_of_float32_stay_numbers(level):
    weight = Weight.random(BlockFormat(3, 64, 4, 16, symmetric=True), np.float32)
    x = np.zeros((1, 64), np.float32)
    x[0, :4] = 1e-40, 1e-38, 1e-33, 0
    x[0, 16:18] = 1e37, -1e37
    run = session(nbits_node(weight, level, 0), str(INSTALLED))
    for name in available_sets(INTEGER_SETS):
        with instruction_set(name):
            found = run.run(None, {"x": x})[0]
        np.testing.assert_allclose(found, x.astype(np.float64) @ weight.dense.T, rtol=0.02)


@needs_kernels
def test_shapes_that_do_not_fit_are_refused():
    weight = Weight.random(BlockFormat(5, 37, 4, 16, symmetric=False), np.float32)
    x, addend = numbers(0, (2, 37), np.float32), numbers(1, (2, 5), np.float32)
    fits = onnx.load_from_string(nbits_node(weight, ROUNDED, 2))
    for value in fits.graph.input:
        for place, name in enumerate(("rows", "columns")):
            value.type.tensor_type.shape.dim[place].dim_param = f"{value.name}_{name}"
    run = session(fits.SerializeToString(), str(INSTALLED))
    with pytest.raises(Exception, match=r"addend has shape \(3, 5\), expected \(2, 5\) or \(5\)"):
        run.run(None, {"x": x, "addend": numbers(1, (3, 5), np.float32)})
    with pytest.raises(Exception, match=r"x has shape \(2, 36\), expected \(M, 37\)"):
        run.run(None, {"x": x[:, 1:], "addend": addend})
    wrong = onnx.ModelProto()
    wrong.CopyFrom(fits)
    wrong.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weight.scales[1:], "scales"))
    with pytest.raises(Exception, match=r"scales \(4, 3\), expected \(5, 3, 8\) and \(5, 3\)"):
        session(wrong.SerializeToString(), str(INSTALLED)).run(None, {"x": x, "addend": addend})


@needs_kernels
@pytest.mark.parametrize(("name", "value"), [("bits", 2), ("block_size", 48)])
def test_attributes_nobody_exports_are_refused(name, value):
    weight = Weight.random(BlockFormat(5, 37, 4, 16, symmetric=True), np.float32)
    model = onnx.load_from_string(nbits_node(weight, ROUNDED, 0))
    next(a for a in model.graph.node[0].attribute if a.name == name).i = value
    with pytest.raises(Exception, match=f"{name} must be .* found {value}"):
        session(model.SerializeToString(), str(INSTALLED))


# --- in a whole model ---------------------------------------------------------------------------

SETTINGS = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 17}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("nbits") / "m", tie_word_embeddings=True)


@pytest.mark.sampled
@needs_kernels
@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig("int4"),
        QuantizeConfig("int8", block_size=16, symmetric=False),
        QuantizeConfig("int4", symmetric=False, lm_head="int8", accuracy_level=1),
    ],
    ids=["int4", "int8, asymmetric", "int4, asymmetric, int8 lm_head, exact"],
)
def test_a_quantised_model_runs_without_matmul_nbits_and_means_the_same(config, source, tmp_path):
    bundle = lminf_export.export(source, tmp_path / "b", quantize=config, **SETTINGS)
    for kernels in ("auto", "none"):
        kinds = {e["op_name"] for e in steps_events(bundle, kernels, tmp_path)}
        assert ("MatMulNBits" in kinds) == (kernels == "none")
        assert (LINEAR_NBITS in kinds) == (LINEAR_NBITS_ADD in kinds) == (kernels == "auto")
        # The tied table is looked up as it is stored; float16 scales by standard operators.
        assert ("GatherBlockQuantized" in kinds) == (config.weights == "int8")
        assert "Gemm" not in kinds
    kernel, body = decoded(bundle, "auto"), decoded(bundle, "none")
    if config.accuracy_level == EXACT:  # they differ by the order of float32's sums
        bound = 2e-5 * np.ptp(body)
    else:  # and by activations half way between two integers, less than rounding itself costs
        bound = np.abs(body - decoded(bundle, "none", level=EXACT)).max()
        assert bound < 0.1 * np.ptp(body)
    assert np.abs(kernel - body).max() <= bound


def decoded(bundle, kernels: str, level: int | None = None) -> np.ndarray:
    """Logits of a text read in chunks, then token by token, past two windows."""
    graph = onnx.load(bundle.graph_path, load_external_data=False)
    for attribute in (a for node in graph.graph.node for a in node.attribute):
        if attribute.name == "accuracy_level" and level is not None:
            attribute.i = level
    session = OnnxRuntimeSession(
        bundle, threads=1, kernels=kernels, graph=graph.SerializeToString()
    )
    model = LanguageModel(bundle, session)
    state, tokens = model.new_state(), np.random.default_rng(3).integers(0, 131, (1, 53))
    parts = [tokens[:, :40], *np.split(tokens[:, 40:], 13, axis=1)]
    return np.concatenate([model.forward(part, state) for part in parts], axis=1)
