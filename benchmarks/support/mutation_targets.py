"""Files that a command reads, each with what reads it: the targets of `scripts.checks.mutations`.

A target is made once in a folder. For each mutant the folder is copied, one of its files is
changed, and the target's action runs as a user's call would.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lminf_export
from benchmarks.support import own_families
from benchmarks.support.families import CASES
from benchmarks.support.gguf_files import save_gguf
from benchmarks.support.mutations import (
    json_text,
    mutate_array,
    mutate_bytes,
    mutate_gguf,
    mutate_json,
    mutate_npz,
    mutate_safetensors,
)
from lminf_export.bundle.manifest import content_sha256
from lminf_export.evaluate.perplexity import evaluate_perplexity
from lminf_export.export.options import ExportOptions
from lminf_export.export.run import prepare
from lminf_export.models.transformers_tables import is_known
from lminf_export.runtime.snapshot import Snapshot

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo-llama"
SETTINGS: dict[str, Any] = {"window_size": 8, "chunk_size": 4, "num_sink_tokens": 2}
# Families whose configurations are mutated: every structure that an adapter treats by itself.
FAMILIES = ("llama", "gemma3_text", "mixtral", "phi3", "gpt_oss", "glm4_moe", "gpt_neox", "cohere2")
# Those of them that are written as GGUF.
GGUF = ("llama", "gemma3_text", "mixtral", "phi3", "gpt_oss", "gpt_neox")
OWN = ("gptj", "mpt", "bloom", "falcon-40b")
# Types without tests, which are refused by kind or probed.
OTHERS = ("deepseek_v3", "lfm2", "qwen3_next", "gpt2", "cwm", "bert", "llama4_text", "gemma3n_text")
# Of so many mutants the last goes the whole way: it is exported and loaded too.
WHOLE_WAY = 300


@dataclass(frozen=True)
class Target:
    """Something to mutate.

    Attributes:
        name: of the kind of file.
        folders: prepared folders, one of which a mutant starts from.
        change: changes one file of a copy of a folder.
        act: reads the copy; the number says which mutant it is.
        share: of all mutants.
    """

    name: str
    folders: tuple[Path, ...]
    change: Callable[[Path, random.Random], None]
    act: Callable[[Path, int], object]
    share: float


def make_targets(place: Path, each: int | None = None) -> list[Target]:
    """Write the models, bundles and state files that mutants start from.

    Args:
        place: an empty folder.
        each: model types of each kind; all by default.
    """
    models = tuple(_family(place / "models" / name, name) for name in FAMILIES[:each])
    own = tuple(own_families.save(name, place / "own" / name) for name in OWN[:each])
    known = [name for name in OTHERS[:each] if is_known(name)]
    others = tuple(_config_only(place / "configs" / name, name) for name in known)
    configs = (*models, *own, *others)
    in_gguf = tuple(_in_gguf(place / "gguf", model) for model in models if model.name in GGUF)
    adapted = _adapted(place / "adapted", models[0])
    sharded = _sharded(place / "sharded")
    demo = _copy(DEMO, place / "demo")
    bundle = lminf_export.export(demo, place / "bundle", **SETTINGS).path
    held = place / "state"
    _copy(bundle, held)
    (held / "text.txt").write_text("It was a bright cold day in April, and the clocks struck. " * 3)
    evaluate_perplexity(held, [str(held / "text.txt")], max_tokens=40, state_file=held / "s.npz")
    return [
        Target("config.json", configs, _change_config, _prepare, 0.35),
        Target("weights index", (sharded,), _change_index, _prepare, 0.1),
        Target("safetensors header", (models[0], sharded), _change_weights, _prepare, 0.16),
        Target("GGUF file", in_gguf, _change_gguf, _prepare, 0.05),
        Target("adapter", (adapted,), _change_adapter, _prepare_adapted, 0.05),
        Target("tokenizer files", (demo,), _change_tokenizer, _export, 0.002),
        Target("manifest", (bundle,), _change_manifest, _load, 0.17),
        Target("tokenizer in a bundle", (bundle,), _change_bundled_tokenizer, _generate, 0.06),
        Target("config in a bundle", (bundle,), _change_bundled_config, _validate, 0.008),
        Target("state file", (held,), _change_state, _evaluate, 0.1),
        Target("snapshot", (bundle,), _nothing, _restore, 0.05),
    ]


def _family(folder: Path, name: str) -> Path:
    case = next(case for case in CASES if case.model_type == name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return case.save(folder)


def _in_gguf(folder: Path, model: Path) -> Path:
    """Write a model as GGUF into a folder of its own, with a tokenizer of bytes."""
    words = {"model": "llama", "tokens": ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(129))]}
    keys = {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    return save_gguf(model, folder / model.name / "m.gguf", metadata=keys).parent


def _config_only(folder: Path, name: str) -> Path:
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[name]().to_dict()
    sizes = {"hidden_size": 64, "vocab_size": 128, "intermediate_size": 64, "pad_token_id": None}
    content = {**known, **{k: v for k, v in sizes.items() if k in known}, "model_type": name}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content, default=str))
    return folder


def _sharded(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    case = next(case for case in CASES if case.model_type == "llama")
    model = AutoModelForCausalLM.from_config(replace(case).config())
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def _adapted(folder: Path, model: Path) -> Path:
    """Write a model with an adapter in a folder below it."""
    _copy(model, folder)
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with safe_open(model / "model.safetensors", framework="pt") as file:
        rows, columns = file.get_slice("model.layers.0.self_attn.q_proj.weight").get_shape()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {"A": torch.ones(2, columns), "B": torch.ones(rows, 2)}
    save_file(
        {f"{name}.lora_{part}.weight": tensor for part, tensor in parts.items()},
        adapter / "adapter_model.safetensors",
    )
    return folder


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def _json_file(path: Path, dice: random.Random) -> None:
    path.write_bytes(json_text(mutate_json(json.loads(path.read_bytes()), dice), dice))


def _change_config(folder: Path, dice: random.Random) -> None:
    _json_file(folder / "config.json", dice)


def _change_index(folder: Path, dice: random.Random) -> None:
    _json_file(folder / "model.safetensors.index.json", dice)


def _change_weights(folder: Path, dice: random.Random) -> None:
    path = dice.choice(sorted(folder.glob("*.safetensors")))
    path.write_bytes(mutate_safetensors(path.read_bytes(), dice))


def _change_gguf(folder: Path, dice: random.Random) -> None:
    path = folder / "m.gguf"
    path.write_bytes(mutate_gguf(path.read_bytes(), dice))


def _change_adapter(folder: Path, dice: random.Random) -> None:
    if dice.random() < 0.5:
        _json_file(folder / "adapter" / "adapter_config.json", dice)
    else:
        _change_weights(folder / "adapter", dice)


def _change_tokenizer(folder: Path, dice: random.Random) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    path = folder / dice.choice(names)
    if path.exists():
        _json_file(path, dice)


def _seal(folder: Path, name: str | None = None) -> None:
    """Make a manifest agree with a changed file and with itself, as one who packs it would."""
    path = folder / "lminf.json"
    manifest = json.loads(path.read_text())
    if name is not None:
        raw = (folder / name).read_bytes()
        entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        manifest["files"][name].update(entry)
    manifest["manifest_sha256"] = content_sha256(manifest)
    path.write_text(json.dumps(manifest))


def _change_manifest(folder: Path, dice: random.Random) -> None:
    path = folder / "lminf.json"
    content = json.loads(path.read_text())
    if dice.random() < 0.6:  # most places are in the tables, which follow from the rest
        field = dice.choice([name for name in content if name not in ("inputs", "outputs")])
        changed: Any = {**content, field: mutate_json(content[field], dice)}
    else:
        changed = mutate_json(content, dice)
    if isinstance(changed, dict) and dice.random() < 0.8:
        changed["manifest_sha256"] = content_sha256(changed)
        path.write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(json_text(changed, dice))


def _change_bundled_tokenizer(folder: Path, dice: random.Random) -> None:
    path = folder / "tokenizer.json"
    if dice.random() < 0.1:
        path.write_bytes(mutate_bytes(path.read_bytes(), dice))
    else:
        content = json.loads(path.read_bytes())
        part = dice.choice([name for name in content if name != "model"])
        if dice.random() < 0.6:
            content[part] = mutate_json(content[part], dice)
        else:
            content = mutate_json(content, dice)
        path.write_bytes(json_text(content, dice))
    _seal(folder, "tokenizer.json")


def _change_bundled_config(folder: Path, dice: random.Random) -> None:
    _json_file(folder / "config.json", dice)
    _seal(folder, "config.json")


def _change_state(folder: Path, dice: random.Random) -> None:
    path = folder / "s.npz"
    path.write_bytes(mutate_npz(path.read_bytes(), dice))


def _nothing(folder: Path, dice: random.Random) -> None:
    """Leave the folder as it is: a snapshot is in memory."""


def _prepare(folder: Path, number: int) -> object:
    if number % WHOLE_WAY == WHOLE_WAY - 1:
        return _export(folder, number)
    return prepare(ExportOptions(folder, folder / "out", **SETTINGS))


def _prepare_adapted(folder: Path, number: int) -> object:
    options = {**SETTINGS, "lora": folder / "adapter"}
    if number % WHOLE_WAY == WHOLE_WAY - 1:
        return lminf_export.export(folder, folder / "out", **options)
    return prepare(ExportOptions(folder, folder / "out", **options))


def _export(folder: Path, number: int) -> object:
    return lminf_export.load(lminf_export.export(folder, folder / "out", **SETTINGS).path)


def _load(folder: Path, number: int) -> object:
    model = lminf_export.load(folder)
    return model.forward(np.array([[1, 2, 3]]), model.new_state(1))


def _generate(folder: Path, number: int) -> object:
    model = lminf_export.load(folder)
    prompt = model.codec.encode("One day — ü")
    return "".join(model.codec.stream(model.generate(prompt, max_new_tokens=3), after=prompt))


def _validate(folder: Path, number: int) -> object:
    return lminf_export.validate(folder, num_tokens=64)


def _evaluate(folder: Path, number: int) -> object:
    text = str(folder / "text.txt")
    return evaluate_perplexity(folder, [text], max_tokens=60, state_file=folder / "s.npz")


def _restore(folder: Path, number: int) -> object:
    dice = random.Random(number)
    model = lminf_export.load(folder)
    state = model.new_state(1)
    model.forward(np.array([[1, 2, 3]]), state)
    arrays: dict[str, Any] = dict(model.session.snapshot(state).to_arrays())
    for _ in range(dice.choice((1, 1, 2))):
        mutate_array(arrays, dice.choice(list(arrays)), dice)
        if not arrays:
            break
    found = Snapshot.from_arrays(model.session.snapshot(state).contract, arrays)
    fresh = model.new_state(1)
    model.session.restore(fresh, found)
    return model.forward(np.array([[4, 5]]), fresh)
