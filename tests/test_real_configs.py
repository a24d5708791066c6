"""The models people deploy: their real configurations, in width as they are, cut to a few layers.

Each is exported on the meta device, without weights, to the graph that a bundle would have, and
what an export decides by itself is compared with what is known of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lminf_export import ConfigError, LambdaConfig
from lminf_export.checkpoint.skeleton import Skeleton
from lminf_export.checkpoint.source import open_source
from lminf_export.export.decisions import default_window
from lminf_export.export.trace.tracing import trace
from lminf_export.models.registry import find_family
from lminf_export.operator.graph_contract import GraphContract
from tests.support.memory import MIB
from tests.support.weightless import export_without_weights

CONFIGS = Path(__file__).parent / "fixtures" / "configs"
SINKS, CHUNK = 16, 256  # the defaults


@dataclass(frozen=True)
class Real:
    """What must come out of one configuration by default.

    Attributes:
        window: W, or None where it must be asked for.
        heads: H, G and D.
        theta: base of each rotary table; empty without rotation.
        rotary_dim: R.
        own: for each layer its own window from training, or None for Λ.
        factor: attention factor m.
        softcap: soft cap of the attention's logits.
        notice: what the user must be told.
        scaled: slowest frequency of the first table relative to the unscaled one.
    """

    window: int | None
    heads: tuple[int, int, int]
    theta: tuple[float, ...] = ()
    rotary_dim: int = 0
    own: tuple[int | None, ...] = (None, None)
    factor: float = 1.0
    softcap: float = 0.0
    scaled: float = 1.0
    notice: str = ""


REAL = {
    "llama-2-7b": Real(4096, (32, 32, 128), (1e4,), 128),
    "llama-3.1-8b": Real(4096, (32, 8, 128), (5e5,), 128, scaled=1 / 8),
    "mistral-7b-v0.1": Real(
        4096, (32, 8, 128), (1e4,), 128, own=(4096, 4096), notice="no layer is left"
    ),
    "mistral-7b-v0.3": Real(4096, (32, 8, 128), (1e6,), 128),
    "mixtral-8x7b-v0.1": Real(4096, (32, 8, 128), (1e6,), 128),
    "qwen2.5-7b": Real(4096, (28, 4, 128), (1e6,), 128),
    "qwen3-8b": Real(4096, (32, 8, 128), (1e6,), 128),
    "qwen3-0.6b": Real(4096, (16, 8, 128), (1e6,), 128),
    "gemma-2-9b": Real(4096, (16, 8, 256), (1e4,), 256, own=(4096, None), softcap=50.0),
    "gemma-3-4b-text": Real(
        4096, (8, 4, 256), (1e6, 1e4), 256, own=(1024, 1024, 1024, None), scaled=1 / 8
    ),
    "phi-3-mini-4k": Real(
        4096, (32, 32, 96), (1e4,), 96, own=(2047, 2047), notice="no layer is left"
    ),
    "phi-3-mini-128k": Real(
        4096,
        (32, 32, 96),
        (1e4,),
        96,
        factor=(1 + 5 / 12) ** 0.5,
        scaled=1 / 3.05,
        notice="frozen in its short regime",
    ),
    "gpt-j-6b": Real(2048, (16, 16, 256), (1e4,), 64),
    "mpt-7b": Real(2048, (32, 32, 128)),
    "falcon-7b": Real(2048, (71, 1, 64), (1e4,), 64),
    "falcon-40b": Real(2048, (128, 8, 64), (1e4,), 64),
    "falcon-rw-1b": Real(2048, (32, 32, 64)),
    "bloom-7b1": Real(None, (32, 32, 128)),
    "pythia-6.9b": Real(2048, (32, 32, 128), (1e4,), 32),
    "gpt-oss-20b": Real(
        4096,
        (64, 8, 64),
        (150000.0,),
        64,
        own=(128, None),
        factor=1.3465735902799727,
        scaled=1 / 32,
    ),
    "smollm3-3b": Real(4096, (16, 4, 128), (5e6,), 128, own=(None,) * 4),
    "glm-4-9b": Real(4096, (32, 2, 128), (1e4,), 64),
    "command-r": Real(4096, (64, 64, 128), (8e6,), 128),
    # Multimodal models, of which the text model is exported.
    "gemma-3-4b-it": Real(
        4096, (8, 4, 256), (1e6, 1e4), 256, own=(1024,) * 5 + (None,), scaled=1 / 8
    ),
    "mistral-small-3.1-24b": Real(4096, (32, 8, 128), (1e9,), 128),
    "qwen2.5-vl-7b": Real(4096, (28, 4, 128), (1e6,), 128),
    "qwen3-vl-8b": Real(4096, (32, 8, 128), (5e6,), 128),
    "llava-1.5-7b": Real(4096, (32, 32, 128), (1e4,), 128),
    "internvl3-8b": Real(4096, (28, 4, 128), (1e6,), 128, notice="frozen in its short regime"),
    "smolvlm2-2.2b": Real(4096, (32, 32, 64), (1.3e5,), 64),
    "voxtral-mini-3b": Real(4096, (32, 8, 128), (1e8,), 128),
    "llama-3.2-11b-vision": Real(4096, (32, 8, 128), (5e5,), 128, scaled=1 / 8),
}


def test_every_fixture_is_expected():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(REAL)


def test_a_window_longer_than_the_training_length_is_told():
    assert default_window(2048, 2048) == (2048, [])
    window, (notice,) = default_window(2049, 2048)
    assert window == 2049
    assert "longer than the 2048 the model was first trained on" in notice


@pytest.mark.sampled
@pytest.mark.parametrize("name", REAL)
def test_a_real_configuration_gets_the_right_defaults_and_exports(name, tmp_path):
    wanted = REAL[name]
    config = read_config(name, tmp_path)
    family = find_family(config.model_type)
    length = family.training_length(config)
    if wanted.window is None:
        with pytest.raises(ConfigError, match="--window-size"):
            default_window(None, length)
    window, _ = default_window(2048 if wanted.window is None else None, length)
    assert window == (wanted.window or 2048)
    skeleton = Skeleton(config, torch.float16)
    plan = family.plan(config, LambdaConfig(window), lambda: skeleton.model)
    heads, groups, head_dim = wanted.heads
    assert plan.num_attention_heads == heads
    assert [layer.window_size for layer in plan.layers] == [own or window for own in wanted.own]
    assert [layer.num_sink_tokens for layer in plan.layers] == [
        0 if own else SINKS for own in wanted.own
    ]
    assert GraphContract(plan.layers, "float16", None, config.vocab_size).cache_bytes() == sum(
        2 * 2 * groups * head_dim * (ring(own or window) + (0 if own else SINKS))
        for own in wanted.own
    )
    assert plan.softcap == wanted.softcap
    assert wanted.notice in " ".join(plan.notices)
    check_rotations(plan, wanted)
    contract = GraphContract(plan.layers, "float16", None, config.vocab_size)
    graph = export_without_weights(trace(skeleton, family, plan, contract), plan, tmp_path)
    nodes = [node for node in graph.node if node.op_type == "LambdaAttention"]
    assert len(nodes) == len(wanted.own)
    for node, layer in zip(nodes, plan.layers, strict=True):
        found = {attribute.name: attribute.i for attribute in node.attribute}
        assert found["window_size"] == layer.window_size
        assert found["num_sink_tokens"] == layer.num_sink_tokens
    assert len(graph.input) == 4 + sum(4 if x.num_sink_tokens else 2 for x in plan.layers)
    logits = [dim.dim_param or dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim]
    assert logits[2] == config.vocab_size
    # Nothing as large as a weight was folded into the graph itself.
    assert (tmp_path / "model.onnx").stat().st_size < 24 * MIB


def check_rotations(plan: Any, wanted: Real) -> None:
    """Compare the slowest frequency of every table with the published formula."""
    tables = [rotation for rotation in plan.rotations if rotation.inv_freq.any()]
    assert len(tables) == len(wanted.theta)
    for index, (rotation, theta) in enumerate(zip(tables, wanted.theta, strict=True)):
        assert rotation.rotary_dim == wanted.rotary_dim
        assert rotation.attention_factor == pytest.approx(wanted.factor)
        slowest = theta ** -(1 - 2 / wanted.rotary_dim) * (1.0 if index else wanted.scaled)
        assert float(rotation.inv_freq[-1]) == pytest.approx(slowest, rel=1e-5)


def ring(window: int) -> int:
    """Slots of a ring: window and chunk, in whole chunks."""
    return (window + CHUNK - 1 + CHUNK - 1) // CHUNK * CHUNK


def read_config(name: str, folder: Path) -> Any:
    """Read a fixture as an export reads a model's folder."""
    (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    return open_source(folder).config
