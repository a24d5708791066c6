"""ONNX models built by other tools, rewritten: equal to the original, and to an export."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

import lminf_export
from benchmarks.support.dynamo_models import build_dynamo
from benchmarks.support.foreign_checkpoints import SLIDING
from benchmarks.support.genai_models import build_models
from benchmarks.support.optimised_models import fuse_by_script, fuse_by_session
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from tests.support import altered_graphs as altered
from tests.support.foreign_models import (
    CHUNK,
    DATA,
    LAMBDA,
    WINDOW,
    Foreign,
    original_logits,
    tokens,
    with_exact_products,
)

# Of the logits' range inside the window, and of logits beyond it: rounding of float32.
INSIDE, BEYOND = 2e-5, 5e-5
FAR = 7 * WINDOW  # several wraps of every ring


@dataclass(frozen=True)
class Case:
    """A model of another tool.

    Attributes:
        checkpoint: name of what it is built of.
        tool: and how it is built.
        inside: tokens up to which the rewritten graph equals the original.
        differs: why the tool's graph does not compute what its checkpoint does, or, of those in
            float16, why it does not run here; "" if it does.
    """

    checkpoint: str
    tool: tuple[str, ...]
    inside: int = WINDOW
    differs: str = ""

    @property
    def id(self) -> str:
        return "-".join((self.checkpoint, *self.tool))


def genai(checkpoint, precision="fp32", provider="cpu", *options, **more):
    return Case(checkpoint, (precision, provider, *options), **more)


def dynamo(checkpoint, attention, opset, **more):
    return Case(checkpoint, (attention, str(opset)), **more)


GENAI = [
    genai("llama"),
    genai("llama", "fp32", "cpu", "prune_lm_head=true"),
    genai("qwen2"),
    genai("qwen3"),
    genai("gemma2"),
    genai("gemma3", differs="the builder leaves out the factor of the full layers' rotation"),
    genai("phi3"),
    genai("phi3_long"),
    genai("gpt_oss"),
    # The builder gives this model's layers no window.
    genai("mistral", inside=SLIDING),
]
GENAI_INT4 = [
    *(genai(name, "int4") for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")),
    genai("gpt_oss_mxfp4", "int4"),
    genai("mistral", "int4", inside=SLIDING),
]
GENAI_QDQ = genai("llama", "int4", "cpu", "use_qdq=true")
GENAI_FP16 = [
    genai("llama", "fp16", "cuda"),
    genai("qwen3", "fp16", "cuda", differs="its norms of queries and keys need a GPU"),
    genai("gemma2", "fp16", "cuda"),
    genai("phi3", "fp16", "cuda"),
    genai("gpt_oss", "fp16", "cuda"),
]
DYNAMO = [
    dynamo("llama", "sdpa", 18),
    dynamo("llama", "eager", 24),
    dynamo("qwen3", "sdpa", 23),
    dynamo("gemma2", "eager", 18),
    dynamo("gemma3", "sdpa", 24),
    dynamo("mistral", "sdpa", 18),
    dynamo("phi3", "sdpa", 23),
    dynamo("bloom", "eager", 18),
]


def each(cases):
    return [pytest.param(case, id=case.id) for case in cases]


def genai_model(foreign: Foreign, case: Case) -> Path:
    """Return a model of onnxruntime-genai's builder; all of them are built at once."""

    def build(to: Path) -> None:
        precision_of = [*GENAI, *GENAI_INT4, GENAI_QDQ, *GENAI_FP16]
        build_models(
            {
                "model": str(foreign.checkpoint(one.checkpoint)),
                "out": str(to / one.id),
                "precision": one.tool[0],
                "provider": one.tool[1],
                "options": list(one.tool[2:]),
            }
            for one in precision_of
        )

    return foreign.made("genai", build) / case.id


def dynamo_model(foreign: Foreign, case: Case) -> Path:
    attention, opset = case.tool
    checkpoint = foreign.checkpoint(case.checkpoint)
    build = partial(build_dynamo, checkpoint, attention=attention, opset=int(opset))
    return foreign.made(f"dynamo/{case.id}", build)


def rewritten(folder: Path, foreign: Foreign, case: Case, to: Path, **options):
    """Rewrite a model, the configuration of its checkpoint beside it; return it loaded."""
    checkpoint = foreign.checkpoint(case.checkpoint)
    bundle = lminf_export.rewrite(folder, to, tokenizer=checkpoint, **LAMBDA, **options)
    return lminf_export.load(bundle.path, threads=1)


def require_original(model, path: Path, count: int, **how) -> None:
    """Compare a rewritten model with the original, step by step in several sizes, every logit."""
    ids = tokens(count, model.vocab_size)
    wanted = original_logits(path, ids, **how)
    limit = INSIDE * np.ptp(wanted)
    for sizes in ([count], [1] * count, [5, 1, count - 6]):
        state = model.new_state()
        parts = np.split(ids, np.cumsum(sizes)[:-1], axis=1)
        found = np.concatenate([model.forward(part, state) for part in parts], axis=1)
        found = found[:, -wanted.shape[1] :]  # pruned heads score the last token only
        assert np.abs(found - wanted).max() <= limit, sizes
    # Two rows of different lengths, each as it is alone.
    short = count - 4
    rows = np.concatenate([ids, tokens(count, model.vocab_size, 2)[1:]])
    state = model.new_state(2)
    found = model.forward(rows, state, lengths=[count, short])
    for row, length in ((0, count), (1, short)):
        wanted = original_logits(path, rows[row : row + 1, :length], **how)[0]
        assert np.abs(found[row, length - len(wanted) : length] - wanted).max() <= limit


def require_export(model, foreign: Foreign, checkpoint: Path) -> None:
    """Compare a rewritten model with our export of its checkpoint far beyond the window."""
    exported = lminf_export.load(foreign.exported(checkpoint, dtype="float32"), threads=1)
    ids = tokens(FAR, model.vocab_size)
    assert FAR > 4 * (WINDOW + CHUNK)
    wanted = exported.forward(ids, exported.new_state())
    found = model.forward(ids, model.new_state())
    assert np.abs(found - wanted).max() <= BEYOND


@pytest.mark.slow
@pytest.mark.parametrize("case", each(GENAI))
def test_a_model_of_onnxruntime_genai(case, foreign, tmp_path):
    folder = genai_model(foreign, case)
    model = rewritten(folder, foreign, case, tmp_path / "b")
    require_original(model, folder / "model.onnx", case.inside)
    if not case.differs:
        require_export(model, foreign, foreign.checkpoint(case.checkpoint))


@pytest.mark.slow
def test_a_rotation_of_long_texts_is_frozen_as_asked(foreign, tmp_path):
    """Compared with the original by its short one, with our export by the long one."""
    case = next(case for case in GENAI if case.checkpoint == "phi3_long")
    folder = genai_model(foreign, case)
    model = rewritten(folder, foreign, case, tmp_path / "b", rope_regime="long")
    checkpoint = foreign.checkpoint(case.checkpoint)
    options = {**LAMBDA, "rope_regime": "long", "dtype": "float32"}
    export = lminf_export.load(lminf_export.export(checkpoint, tmp_path / "e", **options).path)
    ids = tokens(FAR, model.vocab_size)
    wanted = export.forward(ids, export.new_state())
    assert np.abs(model.forward(ids, model.new_state()) - wanted).max() <= BEYOND


@pytest.mark.slow
@pytest.mark.parametrize("case", each(GENAI_INT4))
def test_an_int4_model_of_onnxruntime_genai(case, foreign, tmp_path):
    """Compared with products that round no activations: one near a tie goes either way."""
    folder = with_exact_products(genai_model(foreign, case), tmp_path / "exact")
    model = rewritten(folder, foreign, case, tmp_path / "b")
    require_original(model, folder / "model.onnx", case.inside)


@pytest.mark.slow
@pytest.mark.parametrize("case", each(DYNAMO))
def test_a_model_of_the_exporter_of_torch(case, foreign, tmp_path):
    folder = dynamo_model(foreign, case)
    model = rewritten(folder, foreign, case, tmp_path / "b")
    require_original(model, folder / "model.onnx", case.inside)
    if not case.differs:
        require_export(model, foreign, foreign.checkpoint(case.checkpoint))


OPTIMUM = ("llama", "qwen3", "mistral", "gemma3", "mpt", "bloom", "falcon", "gpt_neox", "gptj")


@pytest.mark.sampled
@pytest.mark.parametrize("name", OPTIMUM)
def test_a_model_of_optimum(name, foreign, tmp_path):
    folder = foreign.optimum(name)
    bundle = lminf_export.rewrite(folder, tmp_path / "b", **LAMBDA)
    model = lminf_export.load(bundle.path, threads=1)
    require_original(model, folder / "model.onnx", WINDOW)
    require_export(model, foreign, DATA / name / "checkpoint")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "fuse", "fused"),
    [
        ("llama", fuse_by_script, ("RotaryEmbedding", "SkipSimplifiedLayerNormalization")),
        ("gpt_neox", fuse_by_script, ("RotaryEmbedding", "LayerNormalization")),
        ("bloom", fuse_by_script, ("SkipLayerNormalization",)),
        ("qwen3", fuse_by_session, ("FusedMatMul", "SimplifiedLayerNormalization")),
        ("mpt", fuse_by_session, ("LayerNormalization",)),
    ],
)
def test_a_model_fused_by_onnxruntime(name, fuse, fused, foreign, tmp_path):
    folder = shutil.copytree(foreign.optimum(name), tmp_path / "fused")
    operators = fuse(foreign.optimum(name) / "model.onnx", folder / "model.onnx")
    assert all(operators[kind] for kind in fused), operators
    bundle = lminf_export.rewrite(folder, tmp_path / "b", **LAMBDA)
    model = lminf_export.load(bundle.path, threads=1)
    require_original(model, folder / "model.onnx", WINDOW)
    require_export(model, foreign, DATA / name / "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("case", each(GENAI_FP16))
def test_a_float16_model_of_onnxruntime_genai(case, foreign, tmp_path):
    """Its distance from what its own numbers make in float32 is no more than the original's."""
    folder = genai_model(foreign, case)
    model = rewritten(folder, foreign, case, tmp_path / "b")
    assert model.bundle.manifest.dtype == "float16"
    ids = tokens(WINDOW, model.vocab_size)
    if not case.differs:
        exact, narrow = (
            original_logits(folder / "model.onnx", ids, wide=wide) for wide in (True, False)
        )
        found = model.forward(ids, model.new_state())
        assert np.abs(found - exact).max() <= 2 * np.abs(narrow - exact).max()
    # Far beyond the window the same of our export, whose float32 numbers are those of float16.
    checkpoint = foreign.checkpoint(case.checkpoint)
    ids = tokens(FAR, model.vocab_size)
    exported = [
        lminf_export.load(foreign.exported(checkpoint, dtype=dtype), threads=1)
        for dtype in ("float32", "float16")
    ]
    exact, narrow, found = (m.forward(ids, m.new_state()) for m in (*exported, model))
    assert np.abs(found - exact).max() <= 2 * np.abs(narrow - exact).max()


@pytest.mark.slow
def test_an_int4_model_whose_products_are_dequantised_before(foreign, tmp_path):
    """use_qdq: the weights come through DequantizeLinear, and are kept so."""
    folder = genai_model(foreign, GENAI_QDQ)
    bundle = rewritten(folder, foreign, GENAI_QDQ, tmp_path / "b").bundle
    # Sessions may fuse them to products that round activations; these two do not.
    model = LanguageModel(bundle, OnnxRuntimeSession(bundle, threads=1, lean=True))
    kinds = {n.op_type for n in onnx.load(str(tmp_path / "b" / "model.onnx")).graph.node}
    assert "DequantizeLinear" in kinds
    require_original(model, folder / "model.onnx", WINDOW)


def first_attention(model):
    return altered.nodes(model, "GroupQueryAttention")[0]


def no_past(model):
    first_attention(model).input[3] = ""


def quantised_cache(model):
    attribute = onnx.helper.make_attribute("kv_cache_bit_width", 4)
    first_attention(model).attribute.append(attribute)


def keys_without_values(model):
    node = first_attention(model)
    node.input[1] = node.input[0]


def no_number_of_heads(model):
    node = first_attention(model)
    for attribute in list(node.attribute):
        if attribute.name == "num_heads":
            attribute.i = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (no_past, ("takes no past keys", "with-past")),
        (quantised_cache, ("has a quantised cache", "without a quantised cache")),
        (keys_without_values, ("keys without values", "a cache for each layer")),
        (no_number_of_heads, ("no number of heads",)),
    ],
)
def test_a_fused_attention_that_is_not_understood_is_refused(alter, words, foreign, tmp_path):
    folder = shutil.copytree(genai_model(foreign, GENAI[0]), tmp_path / "m")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    alter(model)
    onnx.save(model, str(folder / "model.onnx"))
    with pytest.raises(lminf_export.ModelError) as caught:
        lminf_export.rewrite(folder, tmp_path / "b", **LAMBDA)
    message = str(caught.value)
    assert message.startswith("GroupQueryAttention /model/layers.0/attn/GroupQueryAttention ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "b").exists()
