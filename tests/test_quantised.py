"""Quantised checkpoints: decoded as transformers decodes them, or as their numbers were packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.bitnet import pack_weights
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from benchmarks.support.families import CASES, CHUNK, SINKS, WINDOW
from benchmarks.support.quantised_checkpoints import MXFP4, quantise, random_mxfp4_experts
from lminf_export import ModelError, export, load
from lminf_export.checkpoint.dequantize.methods import (
    check_quantization,
    dequantize_checkpoint,
    notices,
)
from lminf_export.tensors.files import read_checkpoint, read_header
from lminf_export.verify.validate import validate
from tests.support.memory import MIB, peak_of_export

TOLERANCE = 2e-5  # of the logits' range: the contract for float32
BY_NAME = {case.model_type: case for case in CASES}


def save(model_type: str, folder: Path, **changes) -> Path:
    """Write a family's tiny model with some settings changed."""
    case = BY_NAME[model_type]
    made = type(case)(**{**vars(case), "changes": {**case.changes, **changes}})
    return made.save(folder)


def whole(tensor) -> torch.Tensor:
    return torch.cat(list(tensor.blocks())).reshape(tensor.shape)


def export_tiny(folder: Path, out: Path, **options):
    return export(
        folder, out, window_size=WINDOW, num_sink_tokens=SINKS, chunk_size=CHUNK, **options
    )


@torch.no_grad()
def error_against(stock, bundle) -> float:
    """Largest difference of a logit inside the window from a model of transformers."""
    tokens = np.random.default_rng(1).integers(3, 131, (1, WINDOW))
    wanted = stock.eval()(torch.from_numpy(tokens), use_cache=False).logits[0].float().numpy()
    model = load(bundle.path)
    got = model.forward(tokens, model.new_state())[0]
    return float(np.abs(got - wanted).max() / np.ptp(wanted))


def is_layer(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith("_proj.weight") and tensor.dim() == 2


def save_mxfp4(folder: Path) -> Path:
    """Write a gpt-oss with its experts as the hub has them."""
    save("gpt_oss", folder, hidden_size=64, intermediate_size=96)
    random_mxfp4_experts(folder)
    return folder


@pytest.mark.slow
def test_gpt_oss_in_mxfp4_equals_transformers_own_dequantised_model(tmp_path):
    folder = save_mxfp4(tmp_path / "m")
    bundle = export_tiny(folder, tmp_path / "b")
    assert any("quantised (mxfp4)" in notice for notice in bundle.manifest.notices)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    stored = load_file(bundle.path / "model.safetensors")
    for name, wanted in stock.state_dict().items():
        assert torch.equal(stored[name], wanted), name
    assert error_against(stock, bundle) < TOLERANCE
    report = validate(bundle.path, model=str(folder))
    assert report.passed, report
    assert report.compared_with == "m"


def test_mxfp4_numbers_are_those_of_transformers_in_any_slice(tmp_path):
    packed = torch.randint(0, 256, (3, 10, 5, 16), dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 10, 5), dtype=torch.uint8)
    save_file({"x_blocks": packed, "x_scales": scales}, tmp_path / "x.safetensors")
    found = dequantize_checkpoint(read_header(tmp_path / "x.safetensors"), MXFP4)["x"]
    wanted = convert_moe_packed_tensors(packed, scales, dtype=torch.float32)
    assert torch.equal(whole(found), wanted)
    for start, stop in ((0, 1), (31, 33), (33, 64), (7, 160)):
        assert torch.equal(found.at(1).rows(start, stop), wanted[1][start:stop])
    assert torch.equal(whole(found.at(2).at(37)), wanted[2][37])


def to_fp8(block: tuple[int, int]):
    """Return what packs a matrix into FP8 with a scale for each block, the last ones partial."""

    def pack(name, tensor):
        if not is_layer(name, tensor):
            return None
        rows, columns = tensor.shape
        padded = torch.zeros(-(-rows // block[0]) * block[0], -(-columns // block[1]) * block[1])
        padded[:rows, :columns] = tensor
        tiles = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
        scale = tiles.abs().amax((1, 3)).clamp(min=1e-9) / 448
        grid = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        numbers = (tensor / grid[:rows, :columns]).to(torch.float8_e4m3fn)
        return {name: numbers, f"{name}_scale_inv": scale}

    return pack


@pytest.mark.sampled
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_fp8_in_blocks_equals_transformers_own_dequantised_model(model_type, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    folder = save(model_type, tmp_path / "m", **sizes, moe_intermediate_size=32)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 32], "fmt": "e4m3"}
    quantise(folder, settings, to_fp8((16, 32)))
    bundle = export_tiny(folder, tmp_path / "b")
    stock = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation="eager",
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32)),
    )
    stored = load_file(bundle.path / "model.safetensors")
    for name, wanted in stock.state_dict().items():
        torch.testing.assert_close(stored[name], wanted, rtol=1e-6, atol=0)
    assert error_against(stock, bundle) < TOLERANCE


def words_of(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack (rows, n) numbers into (rows, n · bits / 32) words, by the bits themselves."""
    each = 32 // bits
    place = order or tuple(range(each))
    words = np.zeros((numbers.shape[0], numbers.shape[1] // each), np.uint32)
    for nibble in range(each):
        words |= numbers[:, place[nibble] :: each].astype(np.uint32) << np.uint32(bits * nibble)
    return torch.from_numpy(words.view(np.int32))


class Packed:
    """Random numbers of a few bits with a zero and a scale for each group of inputs.

    Attributes:
        number: (in, out); zero, scale: (groups, out); group: (in,) of each input.
    """

    def __init__(self, shape, bits, groups, rng, *, scattered=False, least_zero=0):
        outputs, inputs = shape
        self.number = rng.integers(0, 2**bits, (inputs, outputs))
        self.zero = rng.integers(least_zero, 2**bits, (groups, outputs))
        self.scale = rng.uniform(0.01, 0.03, (groups, outputs)).astype(np.float16)
        self.group = np.arange(inputs) // (inputs // groups)
        if scattered:
            self.group = rng.permutation(self.group)

    def weight(self) -> torch.Tensor:
        """The matrix (out, in) these numbers stand for."""
        difference = (self.number - self.zero[self.group]).astype(np.float32)
        return torch.from_numpy((difference * self.scale[self.group].astype(np.float32)).T)


def to_gptq(packed: Packed, bits: int, version: int) -> dict[str, torch.Tensor]:
    stored_zero = packed.zero - (1 if version == 1 else 0)
    return {
        "qweight": words_of(packed.number.T, bits).T.contiguous(),
        "qzeros": words_of(stored_zero, bits),
        "scales": torch.from_numpy(packed.scale),
        "g_idx": torch.from_numpy(packed.group.astype(np.int32)),
    }


def to_awq(packed: Packed) -> dict[str, torch.Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words_of(packed.number, 4, order),
        "qzeros": words_of(packed.zero, 4, order),
        "scales": torch.from_numpy(packed.scale),
    }


def decode(parts: dict[str, torch.Tensor], settings: dict, folder: Path):
    save_file({f"a.{name}": tensor for name, tensor in parts.items()}, folder / "x.safetensors")
    [(name, tensor)] = dequantize_checkpoint(
        read_header(folder / "x.safetensors"), settings
    ).items()
    assert name == "a.weight"
    return tensor


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("scattered", [False, True])
def test_gptq_matrices_are_the_numbers_that_were_packed(bits, version, scattered, tmp_path):
    rng = np.random.default_rng(bits)
    packed = Packed((48, 96), bits, 6, rng, scattered=scattered, least_zero=2 - version)
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "checkpoint_format": ["gptq", "gptq_v2"][version - 1],
    }
    parts = to_gptq(packed, bits, version)
    if not scattered:
        del parts["g_idx"]
    found, wanted = decode(parts, settings, tmp_path), packed.weight()
    assert torch.equal(whole(found), wanted)
    for start, stop in ((0, 1), (5, 6), (3, 29), (47, 48)):
        assert torch.equal(found.rows(start, stop), wanted[start:stop])


def test_symmetric_gptq_stores_the_middle_less_one_as_its_zeros(tmp_path):
    packed = Packed((32, 64), 4, 2, np.random.default_rng(0))
    packed.zero[:] = 8
    parts = to_gptq(packed, 4, 1)
    assert set(parts["qzeros"].flatten().tolist()) == {0x77777777}
    assert torch.equal(whole(decode(parts, {"quant_method": "gptq"}, tmp_path)), packed.weight())


def test_awq_matrices_are_the_numbers_that_were_packed(tmp_path):
    packed = Packed((56, 96), 4, 3, np.random.default_rng(0))
    found = decode(to_awq(packed), {"quant_method": "awq", "version": "gemm", "bits": 4}, tmp_path)
    assert torch.equal(whole(found), packed.weight())
    for start, stop in ((0, 1), (5, 6), (3, 29), (55, 56)):
        assert torch.equal(found.rows(start, stop), packed.weight()[start:stop])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pack_quantized_matrices_are_the_numbers_that_were_packed(bits, symmetric, tmp_path):
    packed = Packed((48, 96), bits, 3, np.random.default_rng(0))
    parts = {
        "weight_packed": words_of(packed.number.T, bits),
        "weight_scale": torch.from_numpy(packed.scale.T.copy()),
        "weight_shape": torch.tensor([48, 96]),
    }
    if symmetric:
        packed.zero[:] = 2 ** (bits - 1)
    else:
        parts["weight_zero_point"] = words_of(packed.zero, bits).T.contiguous()
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    found, wanted = decode(parts, settings, tmp_path), packed.weight()
    torch.testing.assert_close(whole(found), wanted, rtol=1e-6, atol=0)
    assert torch.equal(found.rows(5, 23), whole(found)[5:23])


@pytest.mark.parametrize(
    ("scale_shape", "settings"),
    [
        ((), {"quant_method": "fp8"}),
        ((1,), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ((48, 1), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ((48, 1), {"quant_method": "fbgemm_fp8"}),
        ((3, 4), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        ((4, 2), {"quant_method": "fp8", "weight_block_size": [13, 50]}),
    ],
)
def test_fp8_with_any_grid_of_scales(scale_shape, settings, tmp_path):
    numbers = torch.randn(48, 96).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape) + 0.5
    parts = {"weight": numbers, "weight_scale": scale, "input_scale": torch.ones(1)}
    found = decode(parts, settings, tmp_path)
    down, across = scale_shape if len(scale_shape) == 2 else (1, 1)
    block = settings.get("weight_block_size") or (48 // down, 96 // across)
    grid = scale.reshape(down, across).repeat_interleave(block[0], 0)
    grid = grid.repeat_interleave(block[1], 1)[:48, :96]
    assert torch.equal(whole(found), numbers.float() * grid)
    assert torch.equal(found.rows(11, 30), whole(found)[11:30])


def test_int8_with_a_scale_for_each_row(tmp_path):
    numbers = torch.randint(-128, 128, (48, 96), dtype=torch.int8)
    scale = torch.rand(48, 1, dtype=torch.bfloat16)
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    found = decode({"weight": numbers, "weight_scale": scale}, settings, tmp_path)
    assert torch.equal(whole(found), numbers.float() * scale.float())


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_packed_ternary_weights_are_those_transformers_packs(linear_class, tmp_path):
    ternary = torch.randint(-1, 2, (48, 37)).float()
    parts = {"weight": pack_weights(ternary.clone()), "weight_scale": torch.tensor([1.6])}
    settings = {"quant_method": "bitnet", "linear_class": linear_class}
    found = decode(parts, settings, tmp_path)
    scale = torch.tensor(1.6)
    assert torch.equal(
        whole(found), ternary / scale if linear_class == "bitlinear" else ternary * scale
    )
    assert torch.equal(found.rows(10, 40), whole(found)[10:40])


def test_master_weights_of_bitnet_are_rounded_as_transformers_does_at_each_use(tmp_path):
    master = torch.randn(48, 36)
    save_file({"a.q_proj.weight": master, "lm_head.weight": master + 1}, tmp_path / "x.safetensors")
    settings = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    found = dequantize_checkpoint(read_header(tmp_path / "x.safetensors"), settings)
    scale = 1.0 / master.abs().mean().clamp(min=1e-5)
    wanted = (master * scale).round().clamp(-1, 1) / scale
    torch.testing.assert_close(whole(found["a.q_proj.weight"]), wanted)
    assert torch.equal(whole(found["lm_head.weight"]), master + 1)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Fp4:
    """Random numbers of E2M1 in blocks, the scale of each, and one for all.

    Attributes:
        weight: (…, out, in) that they stand for.
        packed: (…, out, in / 2) uint8; scale: (…, out, in / block); whole: ().
    """

    def __init__(self, shape, block=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        code = torch.randint(0, 16, shape, generator=generator)
        number = E2M1[code % 8] * torch.where(code < 8, 1, -1)
        blocks = (*shape[:-1], shape[-1] // block)
        scale = torch.rand(blocks, generator=generator) * 20 + 0.1
        self.scale, self.whole = scale.to(torch.float8_e4m3fn), torch.tensor(0.0007)
        self.block, self.number = block, number
        self.packed = (code[..., ::2] | code[..., 1::2] << 4).to(torch.uint8)
        self.weight = self.scaled(self.scale.float() * self.whole)

    def scaled(self, scale):
        return self.number * scale.repeat_interleave(self.block, -1)

    def modelopt(self):
        return {"weight": self.packed, "weight_scale": self.scale, "weight_scale_2": self.whole}


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
SLICES = ((0, 1), (5, 6), (3, 29), (47, 48))


def test_nvfp4_of_modelopt_is_the_numbers_that_were_packed(tmp_path):
    made = Fp4((48, 96))
    found = decode({**made.modelopt(), "input_scale": torch.tensor(3.0)}, NVFP4, tmp_path)
    assert torch.equal(whole(found), made.weight)
    for start, stop in SLICES:
        assert torch.equal(found.rows(start, stop), made.weight[start:stop])
    columns = torch.rand(96) + 0.5
    parts = {**made.modelopt(), "pre_quant_scale": columns}
    found = decode(parts, {**NVFP4, "quant_algo": "NVFP4_AWQ"}, tmp_path)
    torch.testing.assert_close(whole(found), made.weight * columns)


def test_a_stack_of_experts_in_nvfp4_is_read_matrix_by_matrix(tmp_path):
    made = Fp4((3, 20, 64))
    name = "x.experts.down_proj"
    factors = torch.tensor([[0.5], [0.25], [2.0]])
    wanted = made.scaled(made.scale.float() * factors[:, None])
    parts = {
        name: made.packed,
        f"{name}_weight_scale": made.scale,
        f"{name}_weight_scale_2": factors,
        f"{name}_input_scale": torch.ones(3),
    }
    save_file(parts, tmp_path / "x.safetensors")
    found = dequantize_checkpoint(read_header(tmp_path / "x.safetensors"), NVFP4)
    assert torch.equal(whole(found[name]), wanted)
    assert torch.equal(found[name].at(2).rows(3, 7), wanted[2][3:7])


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fp4_of_compressed_tensors_is_the_numbers_that_were_packed(kind, tmp_path):
    made = Fp4((48, 96), 16 if kind == "nvfp4" else 32)
    parts = {"weight_packed": made.packed, "weight_scale": made.scale}
    if kind == "nvfp4":
        parts |= {"weight_global_scale": torch.tensor([1300.0]), "input_global_scale": made.whole}
        wanted = made.scaled(made.scale.float() / 1300)
    else:
        parts["weight_scale"] = torch.randint(90, 160, (48, 3), dtype=torch.uint8)
        wanted = made.scaled(torch.exp2(parts["weight_scale"].float() - 127))
    settings = {"quant_method": "compressed-tensors", "format": f"{kind}-pack-quantized"}
    found = decode(parts, settings, tmp_path)
    assert torch.equal(whole(found), wanted)
    for start, stop in SLICES:
        assert torch.equal(found.rows(start, stop), wanted[start:stop])


def test_fp8_of_modelopt_beside_fp4_and_plain_tensors(tmp_path):
    """Excluded modules are plain, and layers of both widths may stand in one checkpoint."""
    made, numbers = Fp4((48, 96)), torch.randn(8, 16).to(torch.float8_e4m3fn)
    parts = {f"a.{name}": tensor for name, tensor in made.modelopt().items()}
    parts |= {"b.weight": numbers, "b.weight_scale": torch.tensor(0.3)}
    parts |= {"b.input_scale": torch.tensor(2.0), "b.k_scale": torch.tensor(1.0)}
    parts["lm_head.weight"] = torch.ones(3, 3)
    save_file(parts, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    settings = {**NVFP4, "quant_algo": "MIXED_PRECISION"}
    found = dequantize_checkpoint(header, settings)
    assert found.keys() == {"a.weight", "b.weight", "lm_head.weight"}
    assert torch.equal(whole(found["a.weight"]), made.weight)
    assert torch.equal(whole(found["b.weight"]), numbers.float() * 0.3)
    assert "keys and values in a cache of 8 bits" in notices(header, settings)[1]
    assert len(notices(["b.weight"], settings)) == 1


@pytest.mark.sampled
@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_a_checkpoint_of_modelopt_exports_as_its_plain_twin(place, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    folder = save("qwen3_moe", tmp_path / "m", **sizes, moe_intermediate_size=32)
    shutil.copytree(folder, tmp_path / "twin")
    plain, seeds = {}, iter(range(1000))

    def quantised(name, tensor):
        if not is_layer(name, tensor):
            return None
        made = Fp4(tuple(tensor.shape), seed=next(seeds))
        plain[name] = made.weight
        base = name.removesuffix(".weight")
        return {f"{base}.{part}": x.clone() for part, x in made.modelopt().items()}

    quantise(folder, {**NVFP4, "ignore": ["lm_head", "*.mlp.gate"]}, quantised)
    if place != "config.json":
        content = json.loads((folder / "config.json").read_text())
        del content["quantization_config"]
        (folder / "config.json").write_text(json.dumps(content))
        settings = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
        (folder / place).write_text(json.dumps({"quantization": settings}))
    path = tmp_path / "twin" / "model.safetensors"
    assert any("experts" in name for name in plain)
    save_file({**load_file(path), **plain}, path, metadata={"format": "pt"})
    bundles = [export_tiny(tmp_path / x, tmp_path / f"{x}-b") for x in ("m", "twin")]
    left, right = (load_file(bundle.path / "model.safetensors") for bundle in bundles)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    configs = [json.loads((bundle.path / "config.json").read_text()) for bundle in bundles]
    assert configs[0] == configs[1]
    assert not (bundles[0].path / "hf_quant_config.json").exists()


def test_a_damaged_or_incomplete_nvfp4_checkpoint_is_named(tmp_path):
    parts = Fp4((48, 96)).modelopt()
    for name in ("weight_scale", "weight_scale_2"):
        left = {key: x for key, x in parts.items() if key != name}
        with pytest.raises(ModelError, match=rf"lacks 'a\.{name}', without which 'a\.weight'"):
            decode(left, NVFP4, tmp_path)
    for name, wrong in (
        ("weight_scale", parts["weight_scale"][:, :5].contiguous()),
        ("weight_scale_2", torch.ones(48)),
    ):
        with pytest.raises(ModelError, match=rf"a\.weight is U8 .* and a\.{name} is"):
            decode({**parts, name: wrong}, NVFP4, tmp_path)
    settings = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    packed = {"weight_packed": parts["weight"], "weight_scale": parts["weight_scale"]}
    with pytest.raises(ModelError, match=r"lacks 'a\.weight_global_scale'"):
        decode(packed, settings, tmp_path)
    folder = save("llama", tmp_path / "m")
    (folder / "hf_quant_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"hf_quant_config\.json of model .* is damaged"):
        export_tiny(folder, tmp_path / "b")


PACKERS = {
    "gptq": (lambda x: to_gptq(x, 4, 1), {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "awq": (to_awq, {"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 16}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model_type"), [("gptq", "qwen2"), ("awq", "mixtral")])
def test_a_packed_checkpoint_exports_as_its_plain_twin(method, model_type, tmp_path):
    folder = save(model_type, tmp_path / "m", hidden_size=64, intermediate_size=96, head_dim=16)
    shutil.copytree(folder, tmp_path / "twin")
    pack, settings = PACKERS[method]
    rng, plain = np.random.default_rng(3), {}

    def quantised(name, tensor):
        if tensor.dim() != 2 or not name.endswith((*"123", "_proj.weight", ".weight")):
            return None
        base = name.removesuffix(".weight")
        if not base.endswith(("_proj", "w1", "w2", "w3")):
            return None
        scattered = method == "gptq"
        packed = Packed(
            tuple(tensor.shape), 4, tensor.shape[1] // 16, rng, scattered=scattered, least_zero=1
        )
        plain[name] = packed.weight().contiguous()
        return {f"{base}.{part}": x for part, x in pack(packed).items()}

    quantise(folder, settings, quantised)
    path = tmp_path / "twin" / "model.safetensors"
    assert plain
    save_file({**load_file(path), **plain}, path, metadata={"format": "pt"})
    bundles = [export_tiny(tmp_path / x, tmp_path / f"{x}-b") for x in ("m", "twin")]
    left, right = (load_file(bundle.path / "model.safetensors") for bundle in bundles)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    configs = [json.loads((bundle.path / "config.json").read_text()) for bundle in bundles]
    assert configs[0] == configs[1]


REFUSED = {
    "bitsandbytes": ({"load_in_4bit": True}, r"quantised \(bitsandbytes\), which is not read"),
    **{
        method: ({}, rf"quantised \({method}\), which is not read \(read are awq, bitnet.*unquan")
        for method in ("eetq", "hqq", "aqlm", "torchao", "quanto", "nvfp4", "gguf")
    },
    "awq": ({"version": "gemv"}, "gemm layout with 4 bits; this one has gemv"),
    "gptq": ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "compressed-tensors": ({"format": "marlin-24"}, "this one has marlin-24"),
    "modelopt": ({"quant_algo": "W4A16_AWQ"}, "this one has quant_algo W4A16_AWQ"),
}


def test_settings_that_mean_nothing_are_refused(tmp_path):
    for name, value in (
        ("weight_block_size", "x"),
        ("weight_block_size", [128]),
        ("config_groups", 3),
    ):
        with pytest.raises(ModelError, match=name):
            check_quantization({"quant_method": "fp8", name: value}, "m")
    for value in ("int4", 3, [], {"quant_method": ["fp8"]}, {}):
        with pytest.raises(ModelError, match="is quantised"):
            check_quantization(value, "m")


@pytest.mark.parametrize("method", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(method, tmp_path):
    settings, reason = REFUSED[method]
    folder = save("llama", tmp_path / "m")
    quantise(folder, {"quant_method": method, **settings}, lambda *_: None)
    with pytest.raises(ModelError, match=reason) as caught:
        export_tiny(folder, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_parts_that_are_missing_or_do_not_fit_are_named(tmp_path):
    words = torch.zeros(4, 32, dtype=torch.int32)
    gptq = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match=r"lacks 'a\.qzeros', without which 'a\.qweight'"):
        decode({"qweight": words}, gptq, tmp_path)
    parts = {"qweight": words, "qzeros": words[:1, :4].clone(), "scales": torch.ones(2, 32)}
    with pytest.raises(ModelError, match=r"a\.qzeros is I32 \[1, 4\] and a\.scales is F32 \[2, 32"):
        decode(parts, gptq, tmp_path)
    parts = {"qweight": words, "qzeros": words[:2, :3].clone(), "scales": torch.ones(2, 32)}
    with pytest.raises(ModelError, match="numbers of 3 bits"):
        decode(parts, gptq, tmp_path)
    numbers = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"lacks 'a\.weight_scale'"):
        decode({"weight": numbers}, {"quant_method": "fp8"}, tmp_path)
    with pytest.raises(ModelError, match=r"a\.weight_scale is F32 \[3, 1\]"):
        decode(
            {"weight": numbers, "weight_scale": torch.ones(3, 1)}, {"quant_method": "fp8"}, tmp_path
        )


def test_a_quantised_pickle_is_read_only_when_asked_for(tmp_path):
    packed = Packed((48, 96), 4, 3, np.random.default_rng(0))
    parts = {f"a.{name}": tensor for name, tensor in to_awq(packed).items()}
    torch.save(parts, tmp_path / "pytorch_model.bin")
    raw = read_checkpoint(tmp_path, allow_pickle=True)
    assert torch.equal(
        whole(dequantize_checkpoint(raw, {"quant_method": "awq"})["a.weight"]), packed.weight()
    )


@pytest.mark.slow
def test_decoding_holds_blocks_not_tensors(tmp_path):
    """What an export takes must not follow the size of the decoded tensors.

    By how much writing and tracing overlap is chance, tens of MiB, and only adds: the smallest
    peak of several exports says what few experts need, and that of any what many need at most.
    """
    few, many = (packed_experts(tmp_path / str(factor), factor) for factor in (1, 5))
    code = "transformers.models.gpt_oss.modeling_gpt_oss"
    outs = [str(number) for number in range(3)]
    needed = min(peak_of_export(few, few.with_name(out), code) for out in outs)
    for out in outs:
        more = peak_of_export(many, many.with_name(out), code) - needed
        if more < 40 * MIB:
            break
    written = (many.with_name("0") / "model.safetensors").stat().st_size
    assert written > 300 * MIB
    assert more < 40 * MIB, f"{more / MIB:.0f} MiB more for {written / MIB:.0f} MiB of weights"


def packed_experts(root: Path, factor: int) -> Path:
    """Save a packed gpt-oss with so many times its experts to root/m."""
    root.mkdir()
    folder = root / "m"
    wide = {"hidden_size": 1024, "intermediate_size": 2048}
    save("gpt_oss", folder, **{**wide, "num_hidden_layers": 1, "layer_types": ["full_attention"]})

    def pack(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        experts, inputs, outputs = tensor.shape
        packed = torch.zeros(factor * experts, outputs, inputs // 32, 16, dtype=torch.uint8)
        return {f"{name}_blocks": packed, f"{name}_scales": packed[..., 0] + 120}

    quantise(folder, MXFP4, pack)
    widen(folder, factor)
    return folder


def widen(folder: Path, factor: int) -> None:
    """Give a gpt-oss more experts where they are not packed."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".router." in name or name.endswith("_bias"):
            tensors[name] = tensor.repeat(factor, *[1] * (tensor.dim() - 1))
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] *= factor
    (folder / "config.json").write_text(json.dumps(config))
