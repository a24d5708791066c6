"""Mixtures of experts: each token meets its experts only, from checkpoints as the hub has them."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lminf_export import ModelError, export, load
from lminf_export.checkpoint.conversion import Conversion, Transposed
from lminf_export.models.experts import block_shape, dispatch_to_experts, experts_forward
from lminf_export.tensors.files import read_checkpoint, read_header
from lminf_export.verify.validate import validate
from tests.support.memory import MIB, peak_of_export

WINDOW, SINKS, CHUNK, VOCAB = 23, 5, 7, 131
TOLERANCE = 2e-5  # of the logits' range: the contract for float32

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Case:
    """A family's tiny model, with what is special about its experts switched on."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    def save(self, folder: Path, *, hub_names: bool = True) -> Path:
        """Write the model, random in every parameter, in the hub's names or the model's own."""
        settings = {k: v for k, v in {**SIZES, **self.changes}.items() if k not in self.drop}
        config = CONFIG_MAPPING[self.model_type](**settings)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                mean = 1.0 if parameter.ndim == 1 else 0.0
                parameter.normal_(mean, 0.2)
        model.save_pretrained(folder, save_original_format=hub_names)
        return folder


CASES = [
    Case("mixtral", {"num_local_experts": 5}),
    Case(
        "qwen2_moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 28,
            "shared_expert_intermediate_size": 36,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    Case(
        "qwen3_moe",
        {"num_experts": 7, "moe_intermediate_size": 28, "norm_topk_prob": True},
    ),
    Case("olmoe", {"num_experts": 6, "clip_qkv": 1.5}, ("head_dim",)),
    Case(
        "phimoe",
        {
            "num_local_experts": 5,
            "router_jitter_noise": 0.2,
            "lm_head_bias": True,
            "attention_bias": True,
        },
    ),
    Case(
        "granitemoe",
        {
            "num_local_experts": 5,
            "residual_multiplier": 0.3,
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.2,
        },
        ("head_dim",),
    ),
    Case(
        "gpt_oss",
        {
            "num_local_experts": 5,
            # Low enough for the clamps to act.
            "swiglu_limit": 1.5,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 11,
        },
    ),
]
BY_NAME = {case.model_type: case for case in CASES}


def export_tiny(folder: Path, out: Path) -> Path:
    export(folder, out, window_size=WINDOW, num_sink_tokens=SINKS, chunk_size=CHUNK)
    return out


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_a_hub_checkpoint_exports_equals_stock_and_validates(case, tmp_path):
    folder = case.save(tmp_path / "m")
    bundle = export_tiny(folder, tmp_path / "b")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, WINDOW))
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        wanted = stock(torch.from_numpy(tokens)).logits.numpy()
    model = load(bundle)
    for sizes in ([1] * WINDOW, [7, 7, 7, 2], [3, 1, 5, 2, 7, 5]):
        state, pieces, start = model.new_state(2), [], 0
        for size in sizes:
            pieces.append(model.forward(tokens[:, start : start + size], state))
            start += size
        error = np.abs(np.concatenate(pieces, 1) - wanted).max() / np.ptp(wanted)
        assert error < TOLERANCE, (sizes, error)
    # Past the window, and from the bundle's own folder: transformers must still read it.
    report = validate(bundle)
    assert report.passed, report


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "phimoe", "granitemoe"])
def test_hub_names_become_the_models_own(name, tmp_path):
    hub = BY_NAME[name].save(tmp_path / "hub")
    own = BY_NAME[name].save(tmp_path / "own", hub_names=False)
    conversion = Conversion.of(AutoModelForCausalLM.from_pretrained(hub))
    converted = conversion.apply(read_checkpoint(hub))
    wanted = read_checkpoint(own)
    assert set(converted) == set(wanted) != set(read_checkpoint(hub))
    for key, tensor in wanted.items():
        assert converted[key].shape == tensor.shape
        assert torch.equal(*(torch.cat(list(t.blocks())) for t in (converted[key], tensor))), key
    assert conversion.apply(wanted) == wanted


@pytest.mark.slow
def test_hub_names_and_the_models_own_names_give_the_same_bundle(tmp_path):
    digests = set()
    for hub_names in (True, False):
        folder = BY_NAME["mixtral"].save(tmp_path / f"{hub_names}", hub_names=hub_names)
        bundle = export_tiny(folder, tmp_path / f"{hub_names}-b")
        digests.add(hashlib.sha256((bundle / "model.safetensors").read_bytes()).digest())
    assert len(digests) == 1


def test_a_transposing_conversion_reads_one_matrix_at_a_time(tmp_path):
    stack = torch.randn(3, 5, 7)
    save_file({"x": stack}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["x"]
    for dims in ((1, 2), (0, 1), (0, 2)):
        lazy = Transposed(stored, *dims)
        blocks = list(lazy.blocks())
        wanted = stack.transpose(*dims)
        assert lazy.shape == tuple(wanted.shape)
        assert torch.equal(torch.cat(blocks), wanted.flatten())
        assert len(blocks) == (1 if 0 in dims else 3)


@pytest.mark.slow
def test_expert_matrices_are_only_ever_picked_one_at_a_time(tmp_path):
    bundle = export_tiny(BY_NAME["gpt_oss"].save(tmp_path / "m"), tmp_path / "b")
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    stacks = {t.name for t in model.graph.initializer if len(t.dims) == 3 and t.dims[0] == 5}
    assert len(stacks) == 4
    assert not [n.op_type for n in model.graph.node if stacks & set(n.input)]
    loops = [n for n in model.graph.node if n.op_type == "Loop"]
    bodies = [attribute.g for n in loops for attribute in n.attribute if attribute.name == "body"]
    inner = [n.op_type for g in bodies for n in g.node if stacks & set(n.input)]
    assert inner == ["Gather"] * 4


@pytest.mark.parametrize("num_experts", [1, 5, 128])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 19, 211])
@pytest.mark.parametrize("skew", ["even", "one", "most"])
def test_blocks_hold_every_pair_whatever_the_routing(num_experts, num_tokens, skew):
    generator = torch.Generator().manual_seed(num_tokens)
    k = min(2, num_experts)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if skew != "even":
        scores[: num_tokens if skew == "one" else num_tokens * 4 // 5, :k] += 1
    index = scores.topk(k).indices
    hidden = torch.randn(num_tokens, 3, generator=generator)
    blocks, expert, slot = dispatch_to_experts(hidden, index, num_experts)
    assert tuple(blocks.shape[:2]) == block_shape(num_tokens * k, num_experts)
    assert slot.unique().numel() == num_tokens * k
    assert (expert[slot // blocks.shape[1]] == index.flatten()).all()
    assert (blocks.flatten(0, 1)[slot] == hidden.repeat_interleave(k, 0)).all()
    assert blocks.shape[0] <= k or num_tokens > 1, "one token reads its own experts only"


def test_experts_without_gate_and_with_a_norm_after_them():
    torch.manual_seed(0)
    module = SimpleNamespace(
        num_experts=4,
        has_gate=False,
        has_bias=True,
        has_post_expert_norm=True,
        is_transposed=False,
        up_proj=torch.randn(4, 7, 5),
        up_proj_bias=torch.randn(4, 7),
        down_proj=torch.randn(4, 5, 7),
        down_proj_bias=torch.randn(4, 5),
        act_fn=torch.relu,
        post_expert_norm=lambda x: x / x.norm(dim=-1, keepdim=True),
    )
    hidden, weight = torch.randn(11, 5), torch.rand(11, 3)
    index = torch.rand(11, 4).topk(3).indices
    wanted = torch.zeros_like(hidden)
    for token in range(11):
        for place in range(3):
            e = index[token, place]
            inner = torch.relu(module.up_proj[e] @ hidden[token] + module.up_proj_bias[e])
            out = module.down_proj[e] @ inner + module.down_proj_bias[e]
            wanted[token] += weight[token, place] * out / out.norm()
    torch.testing.assert_close(experts_forward(module, hidden, index, weight), wanted)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("experts.3.w3.weight", "model.layers.0.mlp.experts.gate_up_proj cannot be put together"),
        ("experts.4.w2.weight", r"shape \[4, 60, 44\], config.json asks for \[5, 60, 44\]"),
        ("block_sparse_moe.gate.weight", "lacks model.layers.0.mlp.gate.weight"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_by_name(lost, said, tmp_path):
    folder = BY_NAME["mixtral"].save(tmp_path / "m")
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if "layers.0" not in k or lost not in k}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said):
        export_tiny(folder, tmp_path / "b")


@pytest.mark.slow
def test_pickled_weights_are_read_only_when_asked_for(tmp_path):
    folder = BY_NAME["mixtral"].save(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    wanted = {k: torch.cat(list(t.blocks())) for k, t in read_checkpoint(folder).items()}
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for number, half in enumerate(halves):
        torch.save(half, folder / f"pytorch_model-{number}.bin")
    with pytest.raises(ModelError, match=r"pytorch_model-0\.bin, a pickle.*--allow-pickle"):
        read_checkpoint(folder)
    found = read_checkpoint(folder, allow_pickle=True)
    assert {k: torch.cat(list(t.blocks())).tolist() for k, t in found.items()} == {
        k: t.tolist() for k, t in wanted.items()
    }
    path = export(folder, tmp_path / "b", window_size=WINDOW, allow_pickle=True).path
    assert validate(path).passed


def test_a_pickle_that_asks_to_run_code_is_refused(tmp_path):
    torch.save({"x": Path("anything")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be read as plain tensors"):
        read_checkpoint(tmp_path, allow_pickle=True)
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be read"):
        read_checkpoint(tmp_path, allow_pickle=True)


def write_large_mixtral(folder: Path) -> int:
    """Write 0.3 GB of random bfloat16 experts under the hub's names; return the bytes."""
    settings = {**SIZES, "hidden_size": 1024, "intermediate_size": 3072, "num_local_experts": 8}
    config = CONFIG_MAPPING["mixtral"](**settings, dtype="bfloat16")
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, shape in ((n, p.shape) for n, p in model.named_parameters() if "experts" not in n):
        tensors[name.replace(".mlp.", ".block_sparse_moe.")] = torch.rand(shape) / 9
    shapes = {"w1": (3072, 1024), "w2": (1024, 3072), "w3": (3072, 1024)}
    for layer in range(2):
        for expert in range(8):
            for name, shape in shapes.items():
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                tensors[key] = torch.rand(shape) / 9
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_merging_experts_holds_blocks_not_tensors(tmp_path):
    (tmp_path / "m").mkdir()
    assert write_large_mixtral(tmp_path / "m") > 300 * 10**6
    code = "transformers.models.mixtral.modeling_mixtral"
    peak = peak_of_export(tmp_path / "m", tmp_path / "b", code)
    assert peak < 200 * MIB, f"{peak / MIB:.0f} MiB over the imports"
    print(f"{peak / MIB:.0f} MiB over the imports")
