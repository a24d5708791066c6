"""What a stream computes has the same bits alone and in a batch, whoever shares the batch."""

from __future__ import annotations

import numpy as np
import pytest

import lminf_export
from lminf_export.quantize.config import BLOCK_SIZES, QuantizeConfig
from lminf_export.quantize.formats import BlockFormat
from lminf_export.runtime.kernels import INSTALLED
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.load import load
from tests.support.kernel_sets import (
    INTEGER_SETS,
    SETS,
    available_sets,
    instruction_set,
    needs_kernels,
)
from tests.support.linear_nodes import Weight, linear_node, nbits_node
from tests.support.linear_sessions import numbers, session
from tests.support.tiny_models import save_llama

ROWS = (*range(2, 18), 31, 67)
FEATURES = ((1, 1), (5, 37), (67, 521), (70, 768), (9, 2100))
BATCHES = (2, 3, 5, 8, 13)
VOCABULARY, STEPS = 131, 70

pytestmark = needs_kernels


def check_rows(model: bytes, width: int, dtype: type, most: dict[str, int], what: object) -> None:
    """Assert that rows of a product do not depend on how many, at most, are computed together."""
    x = numbers(0, (max(ROWS), width), dtype)
    run = session(model, str(INSTALLED))
    for name in available_sets(tuple(most)):
        with instruction_set(name):
            alone = np.concatenate([run.run(None, {"x": row})[0] for row in np.split(x, len(x))])
            for rows in filter(most[name].__ge__, ROWS):
                for part in (x[:rows], x[-rows:]):
                    found = run.run(None, {"x": part})[0]
                    wanted = alone[:rows] if np.shares_memory(part, x[:1]) else alone[-rows:]
                    assert found.tobytes() == wanted.tobytes(), (name, rows, what)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_of_a_product_do_not_depend_on_their_number(dtype):
    for out, width in FEATURES:
        model = linear_node("Linear", numbers(1, (out, width), dtype))
        check_rows(model, width, dtype, dict.fromkeys(SETS, max(ROWS)), (out, width))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", [1, 4])
def test_rows_of_a_quantised_product_do_not_depend_on_their_number(level, bits):
    for turn, (block_size, (out, width)) in enumerate(zip(BLOCK_SIZES, FEATURES, strict=True)):
        form = BlockFormat(out, width, bits, block_size, symmetric=turn % 2 == 0)
        model = nbits_node(Weight.random(form, np.float32), level, 0)
        most = dict.fromkeys(INTEGER_SETS, max(ROWS) if level == 1 else 16)
        # Elsewhere many rounded activations meet dequantised weights.
        most["avx512vnni"] = max(ROWS)
        check_rows(model, width, np.float32, most, form)


# --- whole models -------------------------------------------------------------------------------


def decode(model: LanguageModel, streams: list[int], starts: np.ndarray) -> np.ndarray:
    """Logits (steps, streams, vocabulary) of some streams in one batch, each from its own start."""
    tokens = np.stack(
        [np.random.default_rng(stream).integers(0, VOCABULARY, STEPS) for stream in streams]
    )
    state, found = model.new_state(len(streams)), []
    for step in range(STEPS):
        runs = (step >= starts[streams]).astype(np.int64)
        ids = tokens[:, [step]]
        some = {} if runs.all() else {"lengths": runs}
        found.append(model.forward(ids, state, logits="last", **some)[:, 0])
    return np.stack(found)


def check_prompts(model: LanguageModel) -> None:
    """Assert that prompts of several lengths, read in one batch, find the bits they find alone."""
    lengths = np.array([40, 5, 23, 18, 34])
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (len(lengths), lengths.max()))
    state = model.new_state(len(lengths))
    together = model.forward(ids, state, lengths=lengths, logits="last")
    for stream, length in enumerate(lengths):
        alone = model.forward(ids[[stream], :length], model.new_state(), logits="last")
        assert np.array_equal(together[[stream]], alone), stream


CONFIGS = {
    "float32": None,
    "int8": QuantizeConfig("int8"),
    "int4": QuantizeConfig("int4"),
    "int4, asymmetric, exact": QuantizeConfig("int4", symmetric=False, accuracy_level=1),
}


@pytest.mark.sampled
@pytest.mark.parametrize("quantize", CONFIGS.values(), ids=CONFIGS)
def test_a_stream_has_the_same_bits_alone_and_in_any_batch(quantize, tmp_path):
    source = save_llama(tmp_path / "m", num_hidden_layers=2)
    lminf_export.export(
        source, tmp_path / "b", quantize=quantize, window_size=19, num_sink_tokens=3, chunk_size=17
    )
    starts = np.random.default_rng(0).integers(0, 30, max(BATCHES))
    model = load(tmp_path / "b", threads=2, kernels=str(INSTALLED))
    for name in available_sets(INTEGER_SETS):
        with instruction_set(name):
            alone = [decode(model, [stream], starts)[:, 0] for stream in range(max(BATCHES))]
            for batch in BATCHES:
                together = decode(model, list(range(batch)), starts)
                for stream in range(batch):
                    assert np.array_equal(together[:, stream], alone[stream]), (name, batch, stream)
            if quantize is None or quantize.accuracy_level == 1 or name == "avx512vnni":
                check_prompts(model)
